"""The small masked language model of HeteroFL and FedLMT on WikiText-2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedllm.models.submodel import kept
from fedllm.structure import Anatomy, Cut, FedModel

WIKITEXT2_WORDS = 33_278


class Attention(nn.Module):
    """Multi-head self-attention in both directions."""

    def __init__(self, d: int, heads: int, dropout: float):
        super().__init__()
        inner = heads * math.ceil(d / heads)
        self.heads = heads
        self.query = nn.Linear(d, inner)
        self.key = nn.Linear(d, inner)
        self.value = nn.Linear(d, inner)
        self.output = nn.Linear(inner, d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, d)
        q, k, v = (self._split(project(x)) for project in (self.query, self.key, self.value))  # (N, heads, T, c)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (N, heads, T, T)
        mixed = self.dropout(scores.softmax(-1)) @ v
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Post-norm encoder layer: norm(x + attention(x)), norm(x + ffn(x))."""

    def __init__(self, d: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.attention = Attention(d, heads, dropout)
        self.norm1 = nn.LayerNorm(d)
        self.linear1 = nn.Linear(d, ffn)
        self.linear2 = nn.Linear(ffn, d)
        self.norm2 = nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, d)
        x = self.norm1(x + self.dropout(self.attention(x)))
        h = self.linear2(self.dropout(nn.functional.gelu(self.linear1(x))))
        return self.norm2(x + self.dropout(h))


class Embedding(nn.Module):
    """Words plus positions, dropout of the normalised sum."""

    def __init__(self, words: int, positions: int, d: int, dropout: float):
        super().__init__()
        self.words = nn.Embedding(words, d)
        self.positions = nn.Embedding(positions, d)
        self.norm = nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:  # (N, T) int64 -> (N, T, d)
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.dropout(self.norm(self.words(tokens) + self.positions(places)))


class Decoder(nn.Module):
    """linear, GELU, norm, linear to the vocabulary."""

    def __init__(self, d: int, words: int):
        super().__init__()
        self.linear1 = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d)
        self.linear2 = nn.Linear(d, words)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, d) -> (N, T, words)
        return self.linear2(self.norm(nn.functional.gelu(self.linear1(x))))


class MaskedLM(FedModel):
    """A BERT-like Transformer: it is given tokens of which some are ``mask_token`` and predicts every word.

    Args:
        vocab: words; the mask token is one more, an input and never an output.
        width: share of ``d``, of each head's channels, of ``ffn`` and of the decoder, rounded up (to all heads alike).
        d: embedding size.
        heads: attention heads, the same at every width.
        ffn: units between the two feed-forward layers.
        depth: encoder layers.
        length: longest sequence, in tokens.
        dropout: probability.
    """

    def __init__(
        self,
        vocab: int = WIKITEXT2_WORDS,
        width: float = 1.0,
        d: int = 128,
        heads: int = 8,
        ffn: int = 2048,
        depth: int = 3,
        length: int = 64,
        dropout: float = 0.1,
    ):
        super().__init__()
        d, ffn = kept(d, width), kept(ffn, width)
        self.mask_token = vocab
        self.d, self.heads, self.ffn = d, heads, ffn
        self.embedding = Embedding(vocab + 1, length, d, dropout)
        self.layers = nn.ModuleList(Layer(d, heads, ffn, dropout) for _ in range(depth))
        self.decoder = Decoder(d, vocab)

    def forward(self, tokens: Tensor) -> Tensor:  # (N, T) -> (N, T, vocab)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.decoder(x)

    def initialize(self, generator: torch.Generator) -> None:
        """Linear weights N(0, 0.02), biases 0, embeddings N(0, 1) (a norm follows them), norms 1 and 0."""
        for module in self.modules():
            match module:
                case nn.Linear():
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                case nn.Embedding():
                    nn.init.normal_(module.weight, generator=generator)
                case nn.LayerNorm():
                    module.reset_parameters()

    def anatomy(self) -> Anatomy:
        """The embedding is one residual stream through all layers; query and key share channels within every head.

        Numbered are the layers that FedLMT's code decomposes: tables, feed-forward and decoder. Attention is not.
        """
        groups, stream = {"stream": self.d, "decoder": self.d}, Cut("stream")
        axes: dict[str, tuple[Cut | None, ...]] = {
            "embedding.words.weight": (None, stream),
            "embedding.positions.weight": (None, stream),
            "decoder.linear1.weight": (Cut("decoder"), stream),
            "decoder.linear1.bias": (Cut("decoder"),),
            "decoder.linear2.weight": (None, Cut("decoder")),
        }
        norms = {"embedding.norm": "stream", "decoder.norm": "decoder"}
        for i in range(len(self.layers)):
            at, heads = f"layers.{i}", self.heads
            per_head = math.ceil(self.d / heads)
            groups |= {f"{at}.qk": per_head, f"{at}.v": per_head, f"{at}.ffn": self.ffn}
            norms |= {f"{at}.norm1": "stream", f"{at}.norm2": "stream"}
            for name, group in (("query", f"{at}.qk"), ("key", f"{at}.qk"), ("value", f"{at}.v")):
                axes[f"{at}.attention.{name}.weight"] = (Cut(group, outer=heads), stream)
                axes[f"{at}.attention.{name}.bias"] = (Cut(group, outer=heads),)
            axes[f"{at}.attention.output.weight"] = (stream, Cut(f"{at}.v", outer=heads))
            axes[f"{at}.linear1.weight"] = (Cut(f"{at}.ffn"), stream)
            axes[f"{at}.linear1.bias"] = (Cut(f"{at}.ffn"),)
            axes[f"{at}.linear2.weight"] = (stream, Cut(f"{at}.ffn"))
            axes |= {f"{at}.attention.output.bias": (stream,), f"{at}.linear2.bias": (stream,)}
        axes |= {f"{norm}.{kind}": (Cut(group),) for norm, group in norms.items() for kind in ("weight", "bias")}
        depth = range(len(self.layers))
        return Anatomy(
            groups=groups,
            axes=axes,
            layers=(
                "embedding.words",
                "embedding.positions",
                *(f"layers.{i}.{name}" for i in depth for name in ("linear1", "linear2")),
                "decoder.linear1",
                "decoder.linear2",
            ),
            whole=(),
            blocks=(("embedding", "decoder"), *((f"layers.{i}",) for i in depth)),
            heads=("decoder",),
        )
