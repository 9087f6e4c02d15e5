"""Gaussian noise that nobody can draw again: from the operating system's entropy, never from a seed in a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

Noise = Callable[[tuple[int, ...]], Tensor]
"""Standard normal numbers of a shape, float64."""


def from_system(shape: tuple[int, ...]) -> Tensor:
    """By inversion of 53-bit uniforms from ``os.urandom``; torch's and numpy's generators are no cryptographic ones."""
    count = int(np.prod(shape, dtype=np.int64))
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53  # never 0 or 1
    return torch.from_numpy(ndtri(uniform).reshape(shape))


def seeded(generator: torch.Generator) -> Noise:
    """Repeatable, for tests: whoever has the recipe can subtract it, so it guarantees nothing."""
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def coin(probability: float) -> bool:
    """True with this probability, from the operating system's entropy."""
    return int.from_bytes(os.urandom(8), "big") >> 11 < probability * 2**53
