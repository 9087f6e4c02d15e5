"""LoRA on convolutions (FedLoRU's): a down convolution with the layer's own kernel and stride, then 1 x 1 up.

``output = conv(x, W) + (alpha/r) up(dropout(down(x)))``. Factors are kept as the paper's matrices, so that they are a
``LowRank``: ``up (m, r)`` and ``down (r, n)``, m = c_out and n = c_in k^2. FedLMT's split is another: k c_out x k c_in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedllm.core import FedError
from fedllm.lowrank import LowRank
from fedllm.models.build import replace
from fedllm.submodel import Anatomy


class Factor(nn.Module):
    """A matrix that trains: ``weight (rows, cols)``."""

    def __init__(self, rows: int, cols: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, cols))

    def matrix(self) -> Tensor:
        return self.weight


class NestedFactor(nn.Module):
    """mFedLoRU: a frozen ``weight (rows, cols)`` plus ``scale * outer (rows, r) @ inner (r, cols)``, which trains."""

    weight: Tensor

    def __init__(self, rows: int, cols: int, rank: int, scale: float = 1.0):
        super().__init__()
        self.register_buffer("weight", torch.empty(rows, cols))
        self.outer = nn.Parameter(torch.empty(rows, rank))
        self.inner = nn.Parameter(torch.empty(rank, cols))
        self.scale = scale

    def matrix(self) -> Tensor:
        return self.weight + self.scale * self.outer @ self.inner


@dataclass(frozen=True)
class Spec:
    """One pair of factors on every adapted convolution.

    Args:
        rank: r.
        alpha: the scale is ``alpha / r`` (FedLoRU's code; its text has alpha alone).
        dropout: between the two factors.
        budget: mFedLoRU's r_k, the rank of the factors' own updates; None trains the factors themselves.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    budget: int | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Pair(nn.Module):
    """``up`` and ``down`` of one convolution."""

    def __init__(self, m: int, n: int, spec: Spec):
        super().__init__()
        self.up = factor(m, spec.rank, spec.budget)
        self.down = factor(spec.rank, n, spec.budget)
        self.dropout = nn.Dropout(spec.dropout)
        self.scale = spec.scale


def factor(rows: int, cols: int, budget: int | None) -> Factor | NestedFactor:
    """Nested where that takes fewer numbers than the matrix itself: never for thin layers."""
    if budget is None or budget * (rows + cols) >= rows * cols:
        return Factor(rows, cols)
    return NestedFactor(rows, cols, budget)


class LowRankConv(nn.Module):
    """A convolution with any number of low-rank pairs beside its weight W.

    Args:
        conv: the layer that is wrapped: its shape, and its bias if it has one.
        weight: W, ``(c_out, c_in, k, k)``: a Parameter trains and counts, a plain tensor is a buffer and does neither.
        specs: name -> rank and scale of each pair (``shared``, ``private``).

    The names stay the plain model's: ``weight`` for W, and ``NAME.up.weight``, ``NAME.down.weight`` beside it.
    """

    def __init__(self, conv: nn.Conv2d, weight: Tensor, specs: Mapping[str, Spec]):
        super().__init__()
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", weight)
        self.bias = conv.bias
        self.stride, self.padding = conv.stride, conv.padding
        self._pairs = tuple(specs)
        for name, spec in specs.items():
            self.add_module(name, Pair(weight.shape[0], weight[0].numel(), spec))

    def pairs(self) -> list[Pair]:
        return [pair for pair in (self.get_submodule(name) for name in self._pairs) if isinstance(pair, Pair)]

    def forward(self, x: Tensor) -> Tensor:  # (N, c_in, H, W)
        y = self._conv(x, self.weight) if self.bias is None else self._conv(x, self.weight) + self.bias[:, None, None]
        for pair in self.pairs():
            h = self._conv(x, pair.down.matrix().unflatten(1, self.weight.shape[1:]))  # (N, r, H', W')
            y = y + pair.scale * nn.functional.conv2d(pair.dropout(h), pair.up.matrix()[..., None, None])
        return y

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.conv2d(x, weight, None, self.stride, self.padding)


def adaptable(model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    """Every convolution but the stem: FedLoRU adapts the 1 x 1 shortcuts too."""
    return tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and name not in anatomy.whole
    )


def adapt(
    model: nn.Module, names: Sequence[str], specs: Mapping[str, Spec], base: Literal["frozen", "trained"] = "frozen"
) -> nn.Module:
    """Wraps the convolutions in place, pairs still empty (``start`` fills them); returns the model.

    Args:
        base: ``frozen``, W is a buffer (FedLoRU); ``trained``, W stays a parameter (pFedLoRA).
    """
    for name in names:
        conv = model.get_submodule(name)
        if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
            raise FedError(f"only a convolution without groups can be adapted, {name} is {conv}.")
        weight = conv.weight if base == "trained" else conv.weight.detach()
        with torch.device(conv.weight.device):
            replace(model, name, LowRankConv(conv, weight, specs))
    return model


@torch.no_grad()
def start(model: nn.Module, generator: torch.Generator, w0: Literal["zero", "keep"] = "zero") -> None:
    """The adapted layers before round 1.

    Args:
        w0: ``zero``, FedLoRU's code: W = 0 and both factors Kaiming uniform, a purely low-rank net at first;
            ``keep``, its text: W as it is, up = 0, down Kaiming uniform. The two behave completely differently.
    """
    for layer in (module for module in model.modules() if isinstance(module, LowRankConv)):
        if w0 == "zero":
            layer.weight.zero_()
        for i, pair in enumerate(layer.pairs()):
            down, up = pair.down.weight, pair.up.weight
            down.copy_(kaiming(down.shape, generator))
            both = w0 == "zero" and i == 0  # a second pair starts from the function of the first
            up.copy_(kaiming(up.shape, generator) if both else torch.zeros(up.shape))
            nest(pair, generator)


def nest(pair: nn.Module, generator: torch.Generator) -> None:
    """mFedLoRU, every round: outer factors random, inner ones zero."""
    for side in (module for module in pair.modules() if isinstance(module, NestedFactor)):
        with torch.no_grad():
            side.outer.copy_(kaiming(side.outer.shape, generator))
            side.inner.zero_()


def kaiming(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """``U(-1/sqrt(cols), 1/sqrt(cols))``: Kaiming uniform with a = sqrt(5), as PyTorch and PEFT draw factors."""
    return (torch.rand(*shape, generator=generator) * 2 - 1) * shape[1] ** -0.5


def pairs_of(weights: Mapping[str, Tensor], pair: str) -> dict[str, LowRank]:
    """Layer name -> ``up @ down``, the scale *not* folded in, of every layer that has this pair."""
    end = f".{pair}.up.weight"
    layers = [name.removesuffix(end) for name in weights if name.endswith(end)]
    return {layer: LowRank(weights[layer + end], weights[f"{layer}.{pair}.down.weight"]) for layer in layers}


def merge(weights: Mapping[str, Tensor], pair: str, alpha: float) -> dict[str, Tensor]:
    """``W += (alpha/r) up down`` wherever this pair is (FedLoRU, every tau rounds); the factors are left as they are.

    With the factors kept, the effective weight jumps from W + D to W + 2 D; ``restart`` them to keep the function.
    """
    after = dict(weights)
    for layer, product in pairs_of(weights, pair).items():
        W = weights[f"{layer}.weight"]
        after[f"{layer}.weight"] = W + (alpha / product.rank * product).dense().view_as(W).to(W)
    return after


def restart(weights: Mapping[str, Tensor], pair: str, generator: torch.Generator) -> dict[str, Tensor]:
    """The pair's ``down`` drawn anew and its ``up`` zero."""
    after = dict(weights)
    for layer, product in pairs_of(weights, pair).items():
        after[f"{layer}.{pair}.up.weight"] = torch.zeros_like(product.B)
        after[f"{layer}.{pair}.down.weight"] = kaiming(product.A.shape, generator).to(product.A)
    return after


def reconstruct(weights: Mapping[str, Tensor], returned: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """mFedLoRU's server: ``outer`` and ``inner`` as the factor they update, ``A + a A_d A_u``; the rest as returned."""
    whole: dict[str, Tensor] = {}
    for name, tensor in returned.items():
        layer, _, kind = name.rpartition(".")
        if kind == "outer":
            whole[f"{layer}.weight"] = weights[f"{layer}.weight"] + scale * tensor @ returned[f"{layer}.inner"]
        elif kind != "inner":
            whole[name] = tensor
    return whole
