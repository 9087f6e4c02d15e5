"""What a network says of itself: its numbered layers, its blocks, and which of its axes run over the same channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedllm.errors import FedError


@dataclass(frozen=True)
class Cut:
    """One axis of a weight that runs over a channel group: it has ``outer * size * inner`` entries.

    Args:
        group: the channels' name. Axes of one group lose the same channels; a residual stream is one group.
        outer: repetitions around the channels (attention heads of ``size`` channels each).
        inner: consecutive entries of each channel (pixels of a flattened feature map).
    """

    group: str
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Anatomy:
    """What a model says of itself, so that one code slices all of them.

    Args:
        groups: channel group -> its number of channels in the full model.
        axes: weight name -> a ``Cut`` or None (never sliced) per axis.
        layers: module names of the numbered layers; the first is number 1 (FedLMT's rho counts them).
        whole: numbered layers that are never factorised.
        blocks: module names by block; a model of depth b holds blocks 0 to b (block 0: the stem and whatever all hold).
        heads: modules whose output is logits, by the depth of their block.
        beside: other module -> the numbered layer that it goes with, where it does not stand right behind it.
    """

    groups: Mapping[str, int] = field(default_factory=dict)
    axes: Mapping[str, tuple[Cut | None, ...]] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    blocks: tuple[tuple[str, ...], ...] = ()
    heads: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)

    def factorable(self, rho: int) -> tuple[str, ...]:
        """The numbered layers after the first ``rho`` that may be factorised (FedLMT, Def. 3.1)."""
        if not 0 <= rho <= len(self.layers):
            raise FedError(f"rho counts the undecomposed layers, 0 to {len(self.layers)} for this model, got {rho}.")
        return tuple(name for name in self.layers[rho:] if name not in self.whole)

    def numbers(self, names: Iterable[str]) -> dict[str, int]:
        """The numbered layer that every weight goes with.

        Args:
            names: weight names in the model's own order: one without a number (a norm, a shortcut) goes with the
                numbered layer before it, or with the one that it stands ``beside``.
        """
        number, of = 0, {}
        for name in names:
            near = next((layer for module, layer in self.beside.items() if _inside(name, module)), None)
            own = [i for i, layer in enumerate(self.layers, start=1) if layer == near or _inside(name, layer)]
            number = own[0] if own else number
            of[name] = number
        return of

    def depths(self, names: Iterable[str]) -> dict[str, int]:
        """The smallest depth that holds each weight."""
        of = {}
        for name in names:
            found = [b for b, modules in enumerate(self.blocks) if any(_inside(name, module) for module in modules)]
            if not found:
                raise FedError(f"{name} is in no block of this model: declare it in one of {len(self.blocks)} blocks.")
            of[name] = found[0]
        return of


def _inside(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


class Features(NamedTuple):
    """What a classifier makes of ``N`` inputs on the way to its classes.

    Args:
        hidden: after the first linear layer where there are several, or else the representation, ``(N, units)``.
        representation: what the last linear layer reads, ``(N, d)``.
        logits: ``(N, classes)``.
    """

    hidden: Tensor
    representation: Tensor
    logits: Tensor


class FedModel(nn.Module):
    """A model that names its parts and draws its own initial weights."""

    def anatomy(self) -> Anatomy:
        """The channel groups, numbered layers, blocks and heads."""
        raise NotImplementedError

    def legacy_anatomy(self) -> Anatomy:
        """Every convolution a group of its own, residual streams or not; without any, the anatomy itself."""
        return self.anatomy()

    def features(self, x: Tensor) -> Features:
        """What rules that share less than weights look at."""
        raise FedError(
            f"a {type(self).__name__} shows no representation, which this algorithm shares: take model.name=yi1 or cnn."
        )

    def initialize(self, generator: torch.Generator) -> None:
        """Draws every parameter in the order of the modules, and resets the buffers."""
        raise NotImplementedError
