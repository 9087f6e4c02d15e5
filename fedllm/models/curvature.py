"""How many directions the loss is curved in: the stable rank of its Hessian (Park and Klabjan, 2024, Theorem 3.3).

``srank(H) = sum_i lambda_i^2 / max_i lambda_i^2``, and H is met only in products ``H v``, each the cost of a few
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

Point = Mapping[str, Tensor]
"""Parameters, or a direction in their space, by name."""

Loss = Callable[[Point], Tensor]
"""A pure function of the parameters: no layer may keep statistics of what it sees."""

TOLERANCE = 1e-5
"""Power iteration ends where a step adds less than this share to the eigenvalue."""


@dataclass(frozen=True)
class Curvature:
    """What was measured of one Hessian.

    Args:
        stable_rank: between 1 and the number of parameters, but for the error of the estimates.
        standard_error: of the stable rank, from the probes; it does not know of an eigenvalue that is still too small.
        lambda_max: the eigenvalue of the largest absolute value, with its sign.
        frobenius: ``||H||_F``.
        steps: of power iteration.
    """

    stable_rank: float
    standard_error: float
    lambda_max: float
    frobenius: float
    steps: int


def stable_rank(
    losses: Sequence[Loss], params: Point, probes: int, generator: torch.Generator, most: int = 200
) -> Curvature:
    """The stable rank of the Hessian of ``sum(losses)`` at ``params``.

    Power iteration gives ``max |lambda| = |H u|``, from below, so that an unfinished one makes the rank too large. Then
    ``||H||_F^2 = |H u|^2 + E |H (v - (u^T v) u)|^2`` for vectors v of random signs (Hutchinson, 1990): true of every
    unit vector u, and without the largest eigenvalue the estimate varies far less.

    Args:
        losses: terms of the loss, such as batches; only one of them is in memory at a time.
        probes: sign vectors, 2 at least for a standard error.
        generator: a CPU one.
        most: steps of power iteration.

    Raises:
        ValueError: fewer than 2 probes.
    """
    if probes < 2:
        raise ValueError(f"a standard error takes at least 2 probes, got {probes}.")
    u, largest, sign, steps = _largest(losses, params, _signs(params, generator), most)
    squares = []
    for _ in range(probes):
        v = _signs(params, generator)
        along = _dot(u, v)
        Hv = _product(losses, params, {name: v[name] - along * u[name] for name in v})
        squares.append(_dot(Hv, Hv))
    square = largest**2 or 1.0  # of H = 0 every answer is 0
    return Curvature(
        stable_rank=(largest**2 + fmean(squares)) / square,
        standard_error=stdev(squares) / math.sqrt(probes) / square,
        lambda_max=math.copysign(largest, sign),
        frobenius=math.sqrt(largest**2 + fmean(squares)),
        steps=steps,
    )


def _largest(losses: Sequence[Loss], params: Point, v: Point, most: int) -> tuple[Point, float, float, int]:
    """A unit vector u with ``|H u|`` as good as ``max |lambda|``, that length, the sign of u^T H u, the steps taken.

    ``|H u|`` never exceeds ``max |lambda|`` and never falls from step to step, also where two eigenvalues differ in
    their sign alone.
    """
    u, found, before, steps = v, 0.0, -1.0, 0
    while steps < most and found - before > TOLERANCE * found:
        length = math.sqrt(_dot(v, v))
        u = {name: part / length for name, part in v.items()}
        v = _product(losses, params, u)
        before, found, steps = found, math.sqrt(_dot(v, v)), steps + 1
    return u, found, _dot(u, v), steps


def _product(losses: Sequence[Loss], params: Point, v: Point) -> dict[str, Tensor]:
    """``H v``: H is symmetric, so it is the product with a vector from the left, a second pass backwards."""
    total = {name: torch.zeros_like(part) for name, part in params.items()}
    for loss in losses:
        pull = torch.func.vjp(torch.func.grad(loss), dict(params))[1]
        (part,) = pull(dict(v))
        total = {name: total[name] + part[name] for name in total}
    return {name: part.detach() for name, part in total.items()}


def _signs(params: Point, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: (2 * torch.randint(2, part.shape, generator=generator) - 1).to(part) for name, part in params.items()}


def _dot(a: Point, b: Point) -> float:
    return float(sum((a[name] * b[name]).sum(dtype=torch.float64) for name in a))
