"""What a corpus of arrays is: examples that fit in memory, batches made of them, and how outputs are counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Tally = Mapping[str, float]
"""Sums over one batch."""


@dataclass(frozen=True)
class Examples:
    """A split.

    Args:
        x: inputs, one example each along the first axis.
        y: class of each ``(n,)`` int64, or None where the input is its own target.
    """

    x: Tensor
    y: Tensor | None

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> Examples:
        return Examples(self.x.to(device), None if self.y is None else self.y.to(device))


@dataclass(frozen=True)
class Arrays:
    """A corpus. The fields of a subclass are its keys in a recipe's ``data`` section."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of an input as the network gets it."""
        return torch.float32

    @property
    def classes(self) -> int:
        """Outputs of the network."""
        raise NotImplementedError

    @property
    def rows(self) -> Mapping[str, int]:
        """Examples of each split, for planning without the data."""
        raise NotImplementedError

    def load(self, path: str | None, split: Literal["train", "test"], most: int | None, seed: int) -> Examples:
        """A split, or ``most`` examples of it, the first of a seeded shuffle.

        Raises:
            FedError: what is missing or malformed; Unreachable where the Hub does not answer.
        """
        raise NotImplementedError

    def labels(self, path: str | None, split: Literal["train", "test"], most: int | None, seed: int) -> list[int] | int:
        """The class of every example that ``load`` would give, undecoded; their number where they have none."""
        examples = self.load(path, split, most, seed)
        return len(examples) if examples.y is None else examples.y.tolist()

    def train_batch(self, examples: Examples, at: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs, augmented, and targets of the examples ``at (B,)``."""
        raise NotImplementedError

    def test_batch(self, examples: Examples, at: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, the same every time."""
        raise NotImplementedError

    def tally(self, z: Tensor, x: Tensor, y: Tensor) -> Tally:
        """Sums of one batch of outputs."""
        correct = (z.argmax(-1) == y).sum()
        return {"n": float(len(y)), "loss": float(cross_entropy(z, y)) * len(y), "correct": float(correct)}

    def metrics(self, tallies: Sequence[Tally]) -> dict[str, float]:
        """Scores of a split from its batches' sums."""
        n = sum(tally["n"] for tally in tallies)
        return {
            "accuracy": sum(tally["correct"] for tally in tallies) / n,
            "loss": sum(tally["loss"] for tally in tallies) / n,
        }


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Mean over every position: ``z (..., C)``, ``y (...)``; nats."""
    return torch.nn.functional.cross_entropy(z.flatten(0, -2), y.flatten())


def chosen(n: int, most: int | None, split: str, seed: int) -> Any:
    """The rows of a split that are used, ascending: ``most`` of ``n``, drawn by the seed."""
    order = np.random.default_rng([seed, 0 if split == "train" else 1]).permutation(n)
    return np.sort(order[:most])


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
