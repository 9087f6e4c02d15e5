"""The costs of a run in parameters, bytes and FLOPs, by capacity level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedllm.errors import FedError
from fedllm.models.flops import forward_cost, params, trainable


@dataclass(frozen=True)
class Level:
    """What a client of one capacity does in a round.

    Args:
        name: ``b1``, ``b2`` ...
        params: of the client's model, the papers' "communication".
        forward_cost: of one input, ``Cost.total``.
        down_params, up_params: numbers really sent to and by the client.
        train_params: numbers it updates.
        extra_flops: operations besides training (an SVD at the server, a teacher's pass).
    """

    name: str
    params: int
    forward_cost: int
    down_params: int
    up_params: int
    train_params: int = 0
    extra_flops: int = 0


def level(name: str, model: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Level:
    """A client that is sent all of ``model``, trains it and sends it back."""
    n = params(model)
    return Level(name, n, forward_cost(model, shape, dtype).total, n, n, trainable(model))


@dataclass(frozen=True)
class Totals:
    """A whole run, both conventions.

    Args:
        comm_paper_gb: 1e-9 times the parameters of every drawn client's model: a byte a parameter, one direction.
        comm_bytes: 4 bytes for every number that travels, both directions, and ``fixed`` ones.
        flops_paper_1e12: 1e-12 times every drawn client's forward pass of one input.
    """

    comm_paper_gb: float
    comm_bytes: int
    flops_paper_1e12: float

    def json(self) -> dict[str, Any]:
        return {
            "comm_paper_gb": self.comm_paper_gb,
            "comm_bytes": self.comm_bytes,
            "flops_paper_1e12": self.flops_paper_1e12,
        }


def totals(levels: Iterable[Level], drawn: Mapping[str, float], fixed_params: int = 0) -> Totals:
    """The run's columns, for ``drawn[name]`` client-rounds at each level.

    Args:
        fixed_params: numbers sent besides the rounds (a first broadcast, accumulation); true bytes only.
    """
    by_name = {each.name: each for each in levels}
    if missing := [name for name in drawn if name not in by_name]:
        raise FedError(f"clients of level {missing} were drawn, and the levels are {list(by_name)}.")
    rounds = [(by_name[name], times) for name, times in drawn.items()]
    return Totals(
        comm_paper_gb=sum(each.params * times for each, times in rounds) / 1e9,
        comm_bytes=round(
            4 * (sum((each.down_params + each.up_params) * times for each, times in rounds) + fixed_params)
        ),
        flops_paper_1e12=sum(each.forward_cost * times for each, times in rounds) / 1e12,
    )


def plus(*runs: Totals) -> Totals:
    """Phases of one run, one after the other (ProgFed's stages)."""
    return Totals(
        sum(run.comm_paper_gb for run in runs),
        sum(run.comm_bytes for run in runs),
        sum(run.flops_paper_1e12 for run in runs),
    )


def assign(n: int, levels: Sequence[str]) -> list[str]:
    """Each client's level: ``n // len(levels)`` clients each in the given order, the remainder to the last."""
    size = max(1, n // len(levels))
    return [levels[min(i // size, len(levels) - 1)] for i in range(n)]


def expected(levels: Sequence[str], cohort: int, rounds: int) -> dict[str, float]:
    """Client-rounds per level in expectation over the draws."""
    return {name: rounds * cohort * times / len(levels) for name, times in Counter(levels).items()}


def draws(levels: Sequence[str], cohort: int, rounds: int, seed: int) -> dict[str, int]:
    """Client-rounds per level when ``cohort`` of these clients are drawn every round, without replacement.

    The stream is ``np.random.seed(seed)`` and one ``np.random.choice`` a round. FedLMT's printed communication
    identifies its seed: 31.
    """
    stream = np.random.RandomState(seed)
    seen: Counter[str] = Counter({name: 0 for name in levels})
    for _ in range(rounds):
        seen.update(levels[i] for i in stream.choice(range(len(levels)), cohort, replace=False))
    return dict(seen)
