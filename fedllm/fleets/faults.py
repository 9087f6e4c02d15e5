"""Faults on purpose: what clients do wrong, seeded, so that a rule can be seen to bear it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedllm.config.types import NonNegative, Real, Share
from fedllm.core import (
    Algorithm,
    Client,
    ClientResult,
    Failed,
    Fleet,
    Job,
    Reply,
    Round,
    Tensors,
    Worker,
    under,
    within,
)
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.mean import pad
from fedllm.wire.serialization import canonical

LAST = "fault/last"
"""Where a client that may be stale remembers what it sent: in its memory, so that a resumed run repeats it."""


@dataclass(frozen=True)
class Faults:
    """The probability of each fault, for every client in every round; a client has one fault at most.

    Args:
        drop: it never answers, and does not train.
        straggle: it reports ``delay`` seconds more than it took; ``run.deadline`` says whether that is too late.
        nan: one value of its update is NaN.
        zeros: its update is zeros.
        huge: its update is ``factor`` times as large.
        stale: it sends again what it sent the last time; in its first round it is honest.
        wrong_rank: its products have one rank more, its tensors one entry less along the last axis.
        clients: only these clients are faulty; all of them where this is empty.
        delay: seconds.
        factor: of ``huge``.
    """

    drop: Share = 0.0
    straggle: Share = 0.0
    nan: Share = 0.0
    zeros: Share = 0.0
    huge: Share = 0.0
    stale: Share = 0.0
    wrong_rank: Share = 0.0
    clients: tuple[str, ...] = ()
    delay: NonNegative = 3600.0
    factor: Real = 1e6

    def __post_init__(self) -> None:
        if sum(self.shares.values()) > 1:
            raise FedError(f"faults: probabilities sum to 1 at most, and these are {self.shares}.")

    @property
    def shares(self) -> dict[str, float]:
        """Each fault's probability, in a fixed order."""
        return {
            kind: getattr(self, kind) for kind in ("drop", "straggle", "nan", "zeros", "huge", "stale", "wrong_rank")
        }

    def of(self, client: Client, rnd: Round) -> str:
        """This client's fault in this round; empty for an honest one."""
        if self.clients and client.id not in self.clients:
            return ""
        draw = float(torch.rand((), generator=rnd.rng("fault", client.id), dtype=torch.float64))
        for kind, share in self.shares.items():
            if draw < share:
                return kind
            draw -= share
        return ""

    def around(self, fleet: Fleet) -> Fleet:
        """``fleet`` with these faults in it; itself where there are none."""
        return Faulty(fleet, self) if any(self.shares.values()) else fleet


@dataclass(frozen=True)
class Faulty:
    """A fleet whose clients do ``faults`` to what they would have sent."""

    fleet: Fleet
    faults: Faults

    def run(self, algorithm: Algorithm, worker: Worker, jobs: Sequence[Job], rnd: Round) -> Iterator[ClientResult]:
        kinds = {job.client.id: self.faults.of(job.client, rnd) for job in jobs}
        there = [replace(job, memory=_own(job.memory)) for job in jobs if kinds[job.client.id] != "drop"]
        answers = self.fleet.run(algorithm, worker, there, rnd)
        for job in jobs:
            if kinds[job.client.id] == "drop":
                yield ClientResult(Failed(job.client, "it dropped out (a fault on purpose)"), job.memory)
                continue
            done, memory = next(answers)
            last = within(LAST, job.memory)
            if isinstance(done, Failed):
                yield ClientResult(done, {**memory, **under(LAST, last)})
                continue
            reply = self._spoilt(done, kinds[job.client.id], last, rnd)
            sent = under(LAST, reply.returned if self.faults.stale else {})
            yield ClientResult(reply, {**memory, **sent})

    def _spoilt(self, reply: Reply, kind: str, last: Tensors, rnd: Round) -> Reply:
        if kind == "straggle":
            seconds = reply.metrics.get("seconds", 0.0) + self.faults.delay
            return replace(reply, metrics={**reply.metrics, "seconds": seconds})
        if kind == "stale":
            return replace(reply, returned=last or reply.returned)
        if kind == "nan":
            return replace(reply, returned=_poisoned(reply.returned, rnd.rng("poison", reply.client.id)))
        changes: Mapping[str, Callable[[Tensor | LowRank], Tensor | LowRank]] = {
            "zeros": lambda value: _scaled(value, 0.0),
            "huge": lambda value: _scaled(value, self.faults.factor),
            "wrong_rank": _reshaped,
        }
        if kind not in changes:
            return reply
        return replace(
            reply, returned=canonical({name: changes[kind](value) for name, value in reply.returned.items()})
        )


def _own(memory: Tensors) -> Tensors:
    return {name: value for name, value in memory.items() if not name.startswith(f"{LAST}/")}


def _scaled(value: Tensor | LowRank, factor: float) -> Tensor | LowRank:
    """Counters are left alone."""
    if isinstance(value, LowRank):
        return LowRank(value.B * factor, value.A)
    return value * factor if value.is_floating_point() else value


def _reshaped(value: Tensor | LowRank) -> Tensor | LowRank:
    if isinstance(value, LowRank):
        return pad(value, value.rank + 1)
    return value[..., :-1] if value.ndim else value[None]


def _poisoned(returned: Tensors, generator: torch.Generator) -> Tensors:
    """One NaN, in one entry of one tensor, where there is any."""
    parts = {name: value.B if isinstance(value, LowRank) else value for name, value in returned.items()}
    names = [name for name, part in parts.items() if part.is_floating_point() and part.numel()]
    if not names:
        return returned
    name = names[int(torch.randint(len(names), (), generator=generator))]
    value, poisoned = returned[name], parts[name].contiguous().clone()
    poisoned.view(-1)[int(torch.randint(poisoned.numel(), (), generator=generator))] = float("nan")
    return {**returned, name: LowRank(poisoned, value.A) if isinstance(value, LowRank) else poisoned}
