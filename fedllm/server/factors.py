"""The size of each factor. One product has factors of any size, and a rule that averages them averages those."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median_low

import torch
from torch import Tensor

from fedllm.core import Reply, Tensors
from fedllm.lowrank import LowRank

FAR = 100.0
"""A factor that moved this many times as far as the cohort's median is no neighbour of the others."""

GROWN = 1000.0
"""A factor this many times larger than both that were sent has not been trained to be so in one round."""

SIDES = ("B", "A")


def factor_steps(
    replies: Sequence[Reply], factors: Callable[[Reply], Tensors], expected: Callable[[Reply], Tensors]
) -> dict[str, tuple[float, float]]:
    """``|| B_i - B_0 ||_F`` and ``|| A_i - A_0 ||_F`` over the whole model, by client id.

    Args:
        factors: the products whose factors the rule averages, of a reply.
        expected: what would return from a client that did not train.
    """
    moved = {}
    for reply in replies:
        begun, ended = _pair(reply, factors, expected)
        squares = {
            side: sum(_apart(getattr(begun[n], side), getattr(M, side)) for n, M in ended.items()) for side in SIDES
        }
        moved[reply.client.id] = (math.sqrt(squares["B"]), math.sqrt(squares["A"]))
    return moved


def beyond(moved: Mapping[str, tuple[float, float]], times: float) -> dict[str, str]:
    """Those of whom a factor moved more than so many times the cohort's median, and which, by client id.

    The low median of the cohort: it takes more than half of it to move that past the honest ones. A median of 0 gives
    no unit.
    """
    found: dict[str, str] = {}
    for place, side in enumerate(SIDES):
        middle = median_low(each[place] for each in moved.values())
        for id, each in moved.items():
            if middle > 0 and each[place] > times * middle:
                found[id] = (
                    f"Its factor {side} moved by {each[place]:.3g}, {each[place] / middle:.3g} times the cohort's "
                    f"median, {middle:.3g}"
                )
    return found


def grown(reply: Reply, factors: Callable[[Reply], Tensors], expected: Callable[[Reply], Tensors]) -> str | None:
    """Why its factors cannot come from those that were sent, or ``None``."""
    begun, ended = _pair(reply, factors, expected)
    for name, M in ended.items():
        size = max(_norm(begun[name].B), _norm(begun[name].A))
        for side in SIDES:
            now = _norm(getattr(M, side))
            if size > 0 and now > GROWN * size:
                return f"{name}'s factor {side} is {now / size:.3g} times as large as what was sent, {size:.3g}"
    return None


def _pair(
    reply: Reply, factors: Callable[[Reply], Tensors], expected: Callable[[Reply], Tensors]
) -> tuple[dict[str, LowRank], dict[str, LowRank]]:
    """The products before and after training, those of one rank in both."""
    before, after = factors(replace(reply, returned=expected(reply))), factors(reply)
    names = [
        name
        for name, M in after.items()
        if isinstance(M, LowRank) and isinstance(begun := before.get(name), LowRank) and begun.rank == M.rank
    ]
    return {name: before[name] for name in names}, {name: after[name] for name in names}


def _apart(start: Tensor, end: Tensor) -> float:
    """``|| end - start ||_F^2``."""
    return float((end.double() - start.double()).square().sum())


def _norm(factor: Tensor) -> float:
    return float(torch.linalg.vector_norm(factor, dtype=torch.float64))
