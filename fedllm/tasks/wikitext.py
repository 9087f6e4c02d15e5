"""WikiText-2 as masked language modelling (FedLMT's and HeteroFL's Transformer task): words, in blocks of 64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedllm.config.types import Between, Count, needs
from fedllm.errors import FedError, Unreachable
from fedllm.models.transformer import WIKITEXT2_WORDS
from fedllm.tasks.arrays import Arrays, Examples, Tally, cross_entropy, perplexity

HUB = ("Salesforce/wikitext", "wikitext-2-v1")
END = "<eos>"


@dataclass(frozen=True)
class WikiText2(Arrays):
    """Words of Wikipedia articles; a share of them is masked, and the network says every word.

    As in the published runs the loss, and so the perplexity, is over all words, the visible ones too;
    ``masked_accuracy`` is over the masked ones alone.

    Args:
        length: words a block.
        rate: share of the words that are masked.
        words: size of the vocabulary; the most frequent words of the training split, ties in order of appearance.
    """

    length: Count = 64
    rate: Between = 0.15
    words: Annotated[int, Field(ge=3), needs("a whole number from 3 up")] = WIKITEXT2_WORDS

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def dtype(self) -> torch.dtype:
        return torch.long

    @property
    def classes(self) -> int:
        return self.words

    @property
    def rows(self) -> Mapping[str, int]:
        return {"train": 2_088_628 // self.length, "test": 245_569 // self.length}

    def load(self, path: str | None, split: Literal["train", "test"], most: int | None, seed: int) -> Examples:
        """Blocks in the order of the text; ``most`` of them from its beginning."""
        train = _text(path, "train")
        known = _vocabulary(train, self.words)
        text = train if split == "train" else _text(path, split)
        numbers = torch.tensor([known.get(word, known["<unk>"]) for word in text])
        blocks = numbers[: len(numbers) // self.length * self.length].view(-1, self.length)
        if not len(blocks):
            raise FedError(f"The {split} split has {len(numbers)} words, and a block takes {self.length}.")
        return Examples(blocks[:most], None)

    def train_batch(self, examples: Examples, at: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        words = examples.x[at.to(examples.x.device)]
        hidden = (torch.rand(words.shape, generator=rng) < self.rate).to(words.device)
        return words.masked_fill(hidden, self.words), words

    def test_batch(self, examples: Examples, at: Tensor) -> tuple[Tensor, Tensor]:
        """Masks drawn by the places of the batch's blocks."""
        return self.train_batch(examples, at, torch.Generator().manual_seed(int(at[0])))

    def tally(self, z: Tensor, x: Tensor, y: Tensor) -> Tally:
        hidden, loss = x == self.words, float(cross_entropy(z, y))
        correct = (z[hidden].argmax(-1) == y[hidden]).sum()
        return {
            "n": float(y.numel()),
            "loss": loss * y.numel(),
            "perplexity": perplexity(loss),
            "correct": float(correct),
            "masked": float(hidden.sum()),
        }

    def metrics(self, tallies: Sequence[Tally]) -> dict[str, float]:
        """``perplexity`` is exp of the mean; ``perplexity_batches``, the papers', the mean of exp over batches."""
        total = {key: sum(tally[key] for tally in tallies) for key in tallies[0]}
        loss = total["loss"] / total["n"]
        return {
            "perplexity": perplexity(loss),
            "perplexity_batches": total["perplexity"] / len(tallies),
            "masked_accuracy": total["correct"] / max(total["masked"], 1.0),
            "loss": loss,
        }


def _text(path: str | None, split: str) -> list[str]:
    """The split's words, each line closed by a word of its own."""
    lines = _hub(split) if path is None else _local(Path(path).expanduser(), split)
    return [word for line in lines for word in [*line.split(), END]]


def _local(path: Path, split: str) -> list[str]:
    names = (f"wiki.{split}.tokens", f"{split}.txt")
    files = [path / name for name in names if (path / name).is_file()]
    if not files:
        raise FedError(f"data.path={path} has neither {names[0]} nor {names[1]}: give the folder of WikiText-2.")
    try:
        return files[0].read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise FedError(f"{files[0]} cannot be read as UTF-8 text: {error}.") from error


def _hub(split: str) -> list[str]:
    from datasets import load_dataset

    try:
        return list(load_dataset(*HUB, split=split)["text"])
    except Exception as error:  # the client's errors come from five libraries; to the user they are one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unreachable(
            f"The data set {HUB[0]} could not be had from the Hub ({reason}). Give local files: data.path=FOLDER."
        ) from error


def _vocabulary(words: Sequence[str], most: int) -> dict[str, int]:
    counts: dict[str, int] = {END: 0, "<unk>": 0}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    ordered = sorted(counts, key=lambda word: (word not in (END, "<unk>"), -counts[word]))
    return {word: i for i, word in enumerate(ordered[:most])}
