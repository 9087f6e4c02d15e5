"""LoRA on convolutions (FedLoRU's): a down convolution with the layer's own kernel and stride, then 1 x 1 up.

``output = conv(x, W) + (alpha/r) up(dropout(down(x)))``. Factors are kept as the paper's matrices, so that they are a
``LowRank``: ``up (m, r)`` and ``down (r, n)``, m = c_out and n = c_in k^2. FedLMT's split is another: k c_out x k c_in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedllm.core import Model, Round, Tensors
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.models import build
from fedllm.structure import Anatomy

SHARED = "shared"
"""The pair that stands for a rule's low-rank update of a frozen convolution."""

SIDES = {"B": "up", "A": "down"}
"""A product's factors, and the modules that hold them."""


class Factor(nn.Module):
    """A matrix that trains: ``weight (rows, cols)``."""

    def __init__(self, rows: int, cols: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, cols))

    def matrix(self) -> Tensor:
        return self.weight


class NestedFactor(nn.Module):
    """mFedLoRU: a frozen ``weight (rows, cols)`` plus ``outer (rows, r) @ inner (r, cols)``, which train."""

    weight: Tensor

    def __init__(self, rows: int, cols: int, rank: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(rows, cols))
        self.outer = nn.Parameter(torch.empty(rows, rank))
        self.inner = nn.Parameter(torch.empty(rank, cols))

    def matrix(self) -> Tensor:
        return self.weight + self.outer @ self.inner


@dataclass(frozen=True)
class Spec:
    """One pair of factors on every adapted convolution.

    Args:
        rank: r.
        alpha: the scale is ``alpha / r`` (FedLoRU's code; its text has alpha alone).
        dropout: between the two factors.
        nested: mFedLoRU's r_k, the rank of the factors' own updates; None trains the factors themselves.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    nested: int | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Pair(nn.Module):
    """``up`` and ``down`` of one convolution."""

    def __init__(self, m: int, n: int, spec: Spec):
        super().__init__()
        self.up, self.down = (
            Factor(rows, cols) if spec.nested is None else NestedFactor(rows, cols, spec.nested)
            for rows, cols in ((m, spec.rank), (spec.rank, n))
        )
        self.dropout = nn.Dropout(spec.dropout)
        self.scale = spec.scale


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
    """Wraps the convolutions in place, pairs still empty; returns the model.

    Args:
        base: ``frozen``, W is a buffer (FedLoRU); ``trained``, W stays a parameter (pFedLoRA).
    """
    for name in names:
        conv = model.get_submodule(name)
        if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
            raise FedError(f"only a convolution without groups can be adapted, {name} is {conv}.")
        weight = conv.weight if base == "trained" else conv.weight.detach()
        with torch.device(conv.weight.device):
            build.replace(model, name, LowRankConv(conv, weight, specs))
    return model


def start(
    W: Tensor, w0: Literal["zero", "keep"], alpha: float, rng: Callable[[], torch.Generator]
) -> tuple[Tensor, Callable[[int], LowRank]]:
    """The frozen W that a convolution begins with, and the product of rank r that its update starts from.

    Args:
        W: as the network draws it, ``(c_out, c_in, k, k)``.
        w0: ``zero``, FedLoRU's code: W = 0 and both factors Kaiming uniform, a purely low-rank net at first;
            ``keep``, its text: W as it is and no update. The two behave completely differently.
        alpha: LoRA's; ``alpha / r`` is folded into the product.
    """
    m, n = W.shape[0], W[0].numel()

    def both(r: int) -> LowRank:
        generator = rng()
        return LowRank(alpha / r * kaiming((m, r), generator), kaiming((r, n), generator))

    starts: dict[str, tuple[Tensor, Callable[[int], LowRank]]] = {
        "zero": (torch.zeros_like(W), both),
        "keep": (W, lambda r: LowRank.zeros(m, n)),
    }
    return starts[w0]


def freeze(model: Model, w0: Literal["zero", "keep"], alpha: float, rnd: Round) -> Model:
    """The network with every convolution but the stem frozen, for rules on low-rank updates; see ``start``.

    Raises:
        FedError: it has no such convolution.
    """
    names = [f"{layer}.weight" for layer in adaptable(model.make(), model.anatomy)]
    if not names:
        raise FedError(
            "this network has no convolution after its stem, and those are what a rule on low-rank updates freezes: "
            "take model.name=resnet18 or cnn."
        )
    starts = {name: start(model.weights[name], w0, alpha, partial(rnd.rng, "product", name)) for name in names}
    return replace(
        model,
        weights={**model.weights, **{name: W for name, (W, _) in starts.items()}},
        frozen={name: product for name, (_, product) in starts.items()},
    )


def kaiming(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """``U(-1/sqrt(cols), 1/sqrt(cols))``: Kaiming uniform with a = sqrt(5), as PyTorch and PEFT draw factors."""
    return (torch.rand(*shape, generator=generator) * 2 - 1) * shape[1] ** -0.5


def pairs_of(weights: Mapping[str, Tensor], pair: str) -> dict[str, LowRank]:
    """Layer name -> ``up @ down``, the scale *not* folded in, of every layer that has this pair."""
    end = f".{pair}.up.weight"
    layers = [name.removesuffix(end) for name in weights if name.endswith(end)]
    return {layer: LowRank(weights[layer + end], weights[f"{layer}.{pair}.down.weight"]) for layer in layers}


def merge(weights: Mapping[str, Tensor], pair: str, alpha: float) -> dict[str, Tensor]:
    """``W += (alpha/r) up down`` wherever this pair is; the factors are left as they are."""
    after = dict(weights)
    for layer, product in pairs_of(weights, pair).items():
        W = weights[f"{layer}.weight"]
        after[f"{layer}.weight"] = W + (alpha / product.rank * product).dense().view_as(W).to(W)
    return after


def plain(model: Model, update: Tensors) -> dict[str, Any]:
    """The weights of an ordinary network: ``W + update`` in W's shape wherever W is frozen, the others as they are.

    Args:
        update: products or matrices ``(m, n)`` of frozen weights, which are all there whether they have one or not.
    """
    whole = dict(update)
    for name in model.frozen or ():
        W, more = model.weights[name], update.get(name)
        matrix = more.dense() if isinstance(more, LowRank) else more
        whole[name] = W if matrix is None else W + matrix.view_as(W)
    return whole


def unfolded(products: Mapping[str, LowRank], alpha: float) -> dict[str, Tensor]:
    """Products ``LAYER.weight (m, n)`` as the weights beside those convolutions, LoRA's scale taken out of B."""
    weights: dict[str, Tensor] = {}
    for key, M in products.items():
        B, A, scale = _places(key, M, alpha)
        weights |= {B: M.B / scale, A: M.A}
    return weights


def nested_in(products: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """mFedLoRU's ``B/LAYER.weight (m, r)`` and ``A/LAYER.weight (r, n)`` as weights nested in the two factors.

    They begin in the network's own units, before LoRA's scale, which ``folded`` puts into the first factor of B's.
    """
    weights: dict[str, Tensor] = {}
    for key, M in products.items():
        B, A, _ = _places(key, M, 1.0)
        weights |= {B: M.B, A: M.A}
    return weights


def folded(weights: Mapping[str, Tensor], products: Mapping[str, LowRank], alpha: float) -> dict[str, LowRank]:
    """The products in the places of those that were given to ``unfolded`` or ``nested_in``."""
    found = {}
    for key, M in products.items():
        B, A, scale = _places(key, M, alpha)
        found[key] = LowRank(weights[B] * scale, weights[A])
    return found


def _places(key: str, M: LowRank, alpha: float) -> tuple[str, str, float]:
    """The names of B and A in a network, and LoRA's scale, which the factor beside the output has."""
    factor, nested, name = key.rpartition("/")
    pair = f"{name.removesuffix('.weight')}.{SHARED}"
    if not nested:
        return f"{pair}.up.weight", f"{pair}.down.weight", alpha / M.rank
    side = f"{pair}.{SIDES[factor]}"
    return f"{side}.outer", f"{side}.inner", alpha / M.shape[1] if factor == "B" else 1.0
