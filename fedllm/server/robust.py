"""Guards around any rule: what a minority of wrong clients may do to an average of *updates*.

A guard stands between admission and ``aggregate``. It sees how far each client moved,
``Delta_i = returned_i - sent_i``, as the products they are: two pairs of factors can be far apart and be one update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedllm.config.types import Count, Positive, Whole, needs
from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.lowrank import LowRank, settle
from fedllm.server.admission import moved

Guarded = tuple[list[Reply], dict[str, str]]
"""The replies to aggregate, and by client id what was done about the others, in words."""


@dataclass(frozen=True)
class Trust:
    """No guard. Breakdown point 0: one client can move the average anywhere that admission lets it."""

    @property
    def least(self) -> int:
        """Replies that a round needs."""
        return 1

    entrywise: ClassVar[bool] = False
    """Whether it compares clients' updates entry by entry."""

    def check(self, algorithm: Algorithm, model: Model, clients: Sequence[Client], cohort: int) -> None:
        """Says before any training what no round could do.

        Raises:
            FedError: fewer clients in a round than it needs, or clients whose updates have no common entries.
        """
        name = next((name for name, kind in ROBUST.items() if kind is type(self)), type(self).__name__)
        if cohort < self.least:
            raise FedError(
                f"robust.name={name}: {self.least} replies or more are needed, and a round has {cohort} clients. Raise "
                "clients.participation or the number of clients, or take another guard."
            )
        if not self.entrywise:
            return
        if algorithm.own_entries:
            raise FedError(
                f"robust.name={name} compares updates entry by entry, and with this rule {algorithm.own_entries}. "
                "Take robust.name=clip."
            )
        state, first = algorithm.init(model, clients), Round(1, 0, rounds=1)
        alike = {(client.rank, client.width, client.depth, client.level): client for client in clients}
        starts = [
            algorithm.expected(Reply(client, algorithm.download(state, client, first), {})) for client in alike.values()
        ]
        if any(_shapes(start) != _shapes(starts[0]) for start in starts):
            raise FedError(_APART.format(name=name))

    def guard(self, algorithm: Algorithm, replies: Sequence[Reply]) -> Guarded:
        return list(replies), {}


@dataclass(frozen=True)
class Clip(Trust):
    """No client moves further, ``|| Delta_i ||_F`` over the whole model, than ``bound`` times the cohort's median.

    A client beyond it is put back along the segment from what it was sent to what it returned, factors and all, to
    where its products have moved by the bound. Norm clipping as in Sun et al. (2019), the bound taken from the cohort.

    Breakdown point: as an average 0, for a clipped liar still pulls by ``p_i`` times the bound, and more of them by
    more; but the pull is bounded as long as fewer than half of the cohort lie. From half on they set the median.

    Args:
        bound: in medians.
    """

    bound: Positive = 2.0

    def guard(self, algorithm: Algorithm, replies: Sequence[Reply]) -> Guarded:
        norms = [moved(reply.returned, algorithm.expected(reply)) for reply in replies]
        limit = self.bound * median_low(norms) or math.inf  # most did not move: there is no unit to compare with
        kept, notes = [], {}
        for reply, norm in zip(replies, norms, strict=True):
            if norm > limit:
                notes[reply.client.id] = f"clipped: its update's norm, {norm:.3g}, came down to {limit:.3g}"
                reply = replace(reply, returned=_pulled_back(reply.returned, algorithm.expected(reply), limit))
            kept.append(reply)
        return kept, notes


@dataclass(frozen=True)
class Krum(Trust):
    """The ``keep`` replies whose neighbours are nearest are averaged by the rule; the others are left out.

    Blanchard et al. (2017), section 4: the score of i is the sum of ``|| Delta_i - Delta_j ||_F^2`` over its n - f - 2
    nearest.

    Breakdown point: f of n clients with ``n >= 2 f + 3``, so (n - 3) / 2n, just below one half. What is kept is some
    client's own update, and with data that differ it may be no honest average: Krum buys safety with bias.

    Args:
        liars: f, how many of a cohort may be wrong; by default as many as it can bear, ``(n - 3) // 2``.
        keep: replies that are averaged (Multi-Krum); ``n - f`` at most.
    """

    entrywise: ClassVar[bool] = True

    liars: Whole | None = None
    keep: Count = 1

    @property
    def least(self) -> int:
        return 2 * (self.liars or 0) + 3

    def guard(self, algorithm: Algorithm, replies: Sequence[Reply]) -> Guarded:
        """Raises FedError where fewer than ``least`` replies came."""
        n = len(replies)
        if n < self.least:
            raise FedError(
                f"robust.name=krum: {self.least} replies or more are needed, and {n} came. Lower robust.liars."
            )
        f = (n - 3) // 2 if self.liars is None else self.liars
        updates = _updates(algorithm, replies)
        squares = [[0.0] * n for _ in range(n)]
        for i in range(n):
            for j in range(i):
                squares[i][j] = squares[j][i] = _distance_squared(updates[i], updates[j])
        scores = [sum(sorted(row[:i] + row[i + 1 :])[: n - f - 2]) for i, row in enumerate(squares)]
        chosen = sorted(sorted(range(n), key=lambda i: scores[i])[: min(self.keep, n - f)])
        notes = {
            reply.client.id: f"left out by krum: its score is {scores[i]:.3g}, the best one {min(scores):.3g}"
            for i, reply in enumerate(replies)
            if i not in chosen
        }
        return [replies[i] for i in chosen], notes


@dataclass(frozen=True)
class Median(Trust):
    """Every reply's update becomes the coordinate-wise median of all updates (Yin et al., 2018, option I).

    Of products the entries of ``Delta_i``, dense, one weight at a time: ``n d_out d_in`` numbers. What comes out is
    kept at the rank that the mean would have, ``sum_i rank(Delta_i)``, which is exact where that is no less than the
    weight's own; a rule that takes no other rank than it sent gets the best approximation of that one. Each client
    counts once, however many rows it has.

    Breakdown point: (n - 1) / 2n per entry, just below one half. Where clients' data differ the median of honest
    updates is not their mean, and mostly the smaller of the two.
    """

    entrywise: ClassVar[bool] = True

    def guard(self, algorithm: Algorithm, replies: Sequence[Reply]) -> Guarded:
        updates = _updates(algorithm, replies)
        middle: dict[str, Tensor | LowRank] = {}
        for name, first in updates[0].items():
            values = [update[name] for update in updates]
            entries = torch.stack([_dense(value) for value in values]).sort(dim=0).values  # (n, *shape)
            cut = self._cut(len(values))
            middle[name] = entries[cut : len(values) - cut].mean(dim=0)
            if isinstance(first, LowRank):
                rank = min(sum(value.rank for value in values), *first.shape)
                middle[name] = settle(middle[name], rank).top
        return [replace(reply, returned=_moved_by(algorithm, reply, middle)) for reply in replies], {}

    def _cut(self, n: int) -> int:
        """How many of ``n`` sorted entries are left out at each end."""
        return (n - 1) // 2


@dataclass(frozen=True)
class TrimmedMean(Median):
    """As ``Median``, with the mean of what is left of each entry without the ``share`` largest and smallest ones.

    Yin et al. (2018), option II. Breakdown point: ``floor(share n) / n`` liars; one more sets the entry.

    Args:
        share: of the cohort that is cut off at each end, below 1/2.
    """

    share: Annotated[
        float, Field(ge=0, lt=0.5), needs("a number from 0 to below 0.5, for it is cut off at both ends")
    ] = 0.25

    def _cut(self, n: int) -> int:
        return math.floor(self.share * n + 1e-9)


ROBUST: dict[str, type[Trust]] = {
    "none": Trust,
    "clip": Clip,
    "krum": Krum,
    "median": Median,
    "trimmed_mean": TrimmedMean,
}
"""Every guard by the name that ``robust.name`` takes."""


_APART = (
    "robust.name={name} compares updates entry by entry, and these clients train different parts of the model. "
    "Take robust.name=clip, or one size for all."
)


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _updates(algorithm: Algorithm, replies: Sequence[Reply]) -> list[Tensors]:
    """Each ``Delta_i``; products stay products, unless another client returned a matrix in their place.

    Raises:
        FedError: where clients hold different parts of the model, so that their updates have no common entries.
    """
    updates = [
        {name: _difference(reply.returned[name], start) for name, start in algorithm.expected(reply).items()}
        for reply in replies
    ]
    if any(_shapes(update) != _shapes(updates[0]) for update in updates):
        raise FedError(_APART.format(name="median, krum or trimmed_mean"))
    whole = {name for update in updates for name, value in update.items() if isinstance(value, Tensor)}
    return [{name: _dense(value) if name in whole else value for name, value in of.items()} for of in updates]


def _difference(end: Tensor | LowRank, start: Tensor | LowRank) -> Tensor | LowRank:
    if isinstance(end, LowRank) and isinstance(start, LowRank):
        return end - start
    assert isinstance(end, Tensor) and isinstance(start, Tensor)  # admission compared the kinds
    return end.double() - start.double() if end.is_floating_point() else torch.zeros(end.shape)


def _distance_squared(left: Tensors, right: Tensors) -> float:
    """Over the whole model; of products through QR, never formed."""
    total = 0.0
    for name, value in left.items():
        apart = value - right[name]
        total += apart.norm() ** 2 if isinstance(apart, LowRank) else float(apart.square().sum())
    return total


def _dense(value: Tensor | LowRank) -> Tensor:
    return value.dense() if isinstance(value, LowRank) else value


def _moved_by(algorithm: Algorithm, reply: Reply, middle: Tensors) -> Tensors:
    """What this client would have returned, had it moved by ``middle``."""
    returned: dict[str, Tensor | LowRank] = {}
    for name, start in algorithm.expected(reply).items():
        end = reply.returned[name]
        if isinstance(start, LowRank):
            step = middle[name]
            if isinstance(step, Tensor):  # others returned matrices in this product's place
                step = settle(step, min(step.shape)).top
            there = start + step
            there = there if algorithm.any_rank else there.truncate(start.rank)
            returned[name] = LowRank(there.B.to(end.B.dtype), there.A.to(end.A.dtype))
        else:
            returned[name] = (start + middle[name]).to(end.dtype) if end.is_floating_point() else end
    return returned


def _pulled_back(returned: Tensors, start: Tensors, limit: float) -> Tensors:
    """The point at which the products have moved by ``limit``, on the segment from ``start`` to ``returned``.

    Along it ``B(s) A(s) - B_0 A_0 = s L + s^2 Q`` with ``L = dB A_0 + B_0 dA`` and ``Q = dB dA``, so the squared
    distance is ``a s^2 + b s^3 + c s^4``, summed over the weights: a bisection on three numbers.
    """
    a = b = c = 0.0
    for name, first in start.items():
        end = returned[name]
        if isinstance(first, LowRank) and isinstance(end, LowRank):
            dB, dA = end.B.double() - first.B.double(), end.A.double() - first.A.double()
            L = LowRank(torch.cat([dB, first.B.double()], dim=1), torch.cat([first.A.double(), dA]))
            Q = LowRank(dB, dA)
            a, b, c = a + _inner(L, L), b + 2 * _inner(L, Q), c + _inner(Q, Q)
        elif end.is_floating_point():
            a += float((end.double() - first.double()).square().sum())
    low, high = 0.0, 1.0
    for _ in range(200):  # ends where the two are neighbours
        s = (low + high) / 2
        low, high = (s, high) if s * s * (a + s * (b + s * c)) <= limit * limit else (low, s)
    return {name: _between(first, returned[name], low) for name, first in start.items()}


def _inner(P: LowRank, Q: LowRank) -> float:
    """``<P, Q> = tr(P^T Q)``, from the factors, in their dtype."""
    return float(((P.B.T @ Q.B) * (P.A @ Q.A.T)).sum())


def _between(start: Tensor | LowRank, end: Tensor | LowRank, s: float) -> Tensor | LowRank:
    if isinstance(start, LowRank) and isinstance(end, LowRank):
        return LowRank(_between_tensors(start.B, end.B, s), _between_tensors(start.A, end.A, s))
    assert isinstance(start, Tensor) and isinstance(end, Tensor)
    return _between_tensors(start, end, s) if end.is_floating_point() else end


def _between_tensors(start: Tensor, end: Tensor, s: float) -> Tensor:
    return (start.double() + s * (end.double() - start.double())).to(end.dtype)
