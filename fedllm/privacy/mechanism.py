"""The Gaussian mechanism on a round: every client's step clipped to C, summed, and noise added to the sum.

Clients train B alone, below rows of A that the server drew and everybody may know. With ``A^T = Q R`` a step
``(B_i - B_0) A`` is ``c_i Q^T``, ``c_i = (B_i - B_0) R^T``, and has the norm of ``c_i``, for the rows of ``Q^T`` are
orthonormal. Adding or removing one client changes ``sum clip_C(c_i)`` by at most C in norm. What the server then does
with ``s = sum clip_C(c_i) + N(0, (z C)^2)`` is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.core import Algorithm, Client, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.privacy.noise import Noise
from fedllm.server.admission import misfit

EVERYBODY = "*"
"""The id of the one reply that a private round gives to its rule."""

TINY = 1e-9
"""Directions of A below this share of its largest are taken for dependent rows."""


@dataclass(frozen=True)
class Start:
    """Where a client of the largest rank would have begun: known to everybody.

    Args:
        reply: of a client that returned what it was sent.
        expected: what returns from it.
        R: of each product's ``A^T = Q R``, ``(r, r)``, float64.
    """

    reply: Reply
    expected: Tensors
    R: Mapping[str, Tensor]


def start(rule: Algorithm, state: Tensors, clients: Sequence[Client], rnd: Round) -> Start:
    """The public start of this round, from the state and the clients' ranks alone."""
    everybody = Client(EVERYBODY, num_samples=1, rank=max(client.rank for client in clients))
    sent = rule.download(state, everybody, rnd)
    expected = rule.expected(Reply(everybody, sent, sent))
    products = {name: value for name, value in expected.items() if isinstance(value, LowRank)}
    R = {name: torch.linalg.qr(S.A.double().T, mode="r").R for name, S in products.items()}
    return Start(Reply(everybody, sent, expected), expected, R)


def coordinates(begun: Start, sent: Tensors, returned: Tensors) -> dict[str, Tensor]:
    """``c_i``, float64, by name: the client's step in the orthonormal basis of the round's rows.

    The returned A is never looked at: a client may lie about it, and it cannot matter.

    Raises:
        FedError: where the client was not sent the leading part of the public start; the norm would then be another.
    """
    c = {}
    for name, S in begun.expected.items():
        if isinstance(S, LowRank):
            given = sent[name]
            r = given.rank
            if not (torch.equal(given.A, S.A[:r]) and torch.equal(given.B, S.B[:, :r])):
                raise FedError(f"{name}: the rule sent a client other rows than the round's public ones.")
            step = returned[name].B.double() - S.B[:, :r].double()
            c[name] = step @ begun.R[name][:, :r].T
        elif S.is_floating_point():
            c[name] = returned[name].double() - S.double()
    return c


def norm(c: Mapping[str, Tensor]) -> float:
    """Over the whole model."""
    return math.sqrt(sum(float(part.square().sum()) for part in c.values()))


def clipped(c: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """``min(1, C / |c|) c``; nothing where the norm is no finite number."""
    length = norm(c)
    if not math.isfinite(length):
        return {name: torch.zeros_like(part) for name, part in c.items()}
    factor = 1.0 if length <= clip else clip / length
    return {name: part * factor for name, part in c.items()}


def summed(rule: Algorithm, begun: Start, replies: Sequence[Reply], clip: float) -> dict[str, Tensor]:
    """``sum_i clip_C(c_i)``. A client that sent nothing, or nothing of use, adds 0."""
    total = {
        name: torch.zeros(S.B.shape if isinstance(S, LowRank) else S.shape, dtype=torch.float64)
        for name, S in begun.expected.items()
        if isinstance(S, LowRank) or S.is_floating_point()
    }
    ids = [reply.client.id for reply in replies]
    for reply in sorted(replies, key=lambda reply: reply.client.id):  # a sum of floats knows its order
        sent = rule.expected(reply)
        if ids.count(reply.client.id) > 1 or misfit(reply.returned, sent) is not None:
            continue
        for name, part in clipped(coordinates(begun, sent, reply.returned), clip).items():
            total[name] += part
    return total


def released(
    begun: Start, total: Mapping[str, Tensor], *, clip: float, noise_multiplier: float, members: float, noise: Noise
) -> Reply:
    """One reply in everybody's place: the start, moved by the noisy sum over ``members``.

    Args:
        members: q N, fixed before the round; never the number that came.
    """
    returned: dict[str, LowRank | Tensor] = {}
    for name, S in begun.expected.items():
        if name not in total:
            returned[name] = S  # a counter keeps what was sent
            continue
        y = total[name]
        if noise_multiplier > 0:
            y = y + noise(tuple(y.shape)) * (noise_multiplier * clip)
        y = y / members
        if isinstance(S, LowRank):
            dB = y @ torch.linalg.pinv(begun.R[name], rtol=TINY).T
            returned[name] = LowRank((S.B.double() + dB).float(), S.A)
        else:
            returned[name] = (S.double() + y).to(S.dtype)
    return Reply(begun.reply.client, begun.reply.sent, returned)


def numbers(begun: Start) -> int:
    """How many coordinates get noise, D."""
    return sum(
        S.B.numel() if isinstance(S, LowRank) else S.numel()
        for S in begun.expected.values()
        if isinstance(S, LowRank) or S.is_floating_point()
    )
