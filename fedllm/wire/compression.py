"""Fewer bytes around any rule: factors in half precision or in eight bits, both ways, with error feedback.

What is packed is still a product whose B and A are plain numbers, so admission, guards and rules read it as it is; only
the ledger, the wire and files know that it takes less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm.core import Algorithm, Around, Client, ClientWorker, LocalResult, Reply, Round, Tensors, under, within
from fedllm.lowrank import LowRank

Precision = Literal["float32", "float16", "int8"]


@dataclass(frozen=True)
class Int8(LowRank):
    """``B A`` with every column of B and row of A on a grid of 255 steps: ``codes * scale``, each with its own scale.

    Args:
        codes_B, codes_A: int8, of the shapes of B and A.
        scale_B, scale_A: float32 ``(r,)``: a largest entry over 127.
    """

    codes_B: Tensor
    codes_A: Tensor
    scale_B: Tensor
    scale_A: Tensor

    @staticmethod
    def of(product: LowRank) -> Int8:
        """The nearest one: no entry is off by more than half a step of its column of B, or row of A."""
        codes_B, scale_B = _rounded(product.B.T)
        codes_A, scale_A = _rounded(product.A)
        return Int8.unpacked(codes_B.T.contiguous(), codes_A, scale_B, scale_A)

    @staticmethod
    def unpacked(codes_B: Tensor, codes_A: Tensor, scale_B: Tensor, scale_A: Tensor) -> Int8:
        return Int8(codes_B * scale_B, codes_A * scale_A[:, None], codes_B, codes_A, scale_B, scale_A)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``(r, n)`` and scales ``(r,)`` of rows that each get a grid of their own."""
    rows = rows.float()
    scale = rows.abs().amax(dim=1) / 127 if rows.numel() else rows.new_zeros(len(rows))
    codes = torch.round(rows / torch.where(scale > 0, scale, 1.0)[:, None]).to(torch.int8)
    return codes.contiguous(), scale


def packed(tensors: Tensors, precision: Precision) -> dict[str, Any]:
    """Products in this precision. Other floating tensors are float16 in both; integers stay."""
    return {name: _packed(value, precision) for name, value in tensors.items()}


def _packed(value: Any, precision: Precision) -> Any:
    if precision == "float32":
        return value
    if isinstance(value, LowRank):
        return Int8.of(value) if precision == "int8" else LowRank(value.B.half(), value.A.half())
    return value.half() if value.is_floating_point() else value


def opened(tensors: Tensors) -> dict[str, Any]:
    """The same values as plain products and tensors in float32, ready to be trained or averaged."""
    return {name: _opened(value) for name, value in tensors.items()}


def _opened(value: Any) -> Any:
    if isinstance(value, LowRank):
        return LowRank(value.B.float(), value.A.float())
    return value.float() if value.dtype == torch.float16 else value


@dataclass(frozen=True)
class Wire:
    """What travels, in what precision.

    Args:
        down: of downloads. The server corrects for what rounding did to them, see ``Compressed``.
        up: of uploads, with error feedback.
    """

    down: Precision = "float32"
    up: Precision = "float32"

    def around(self, rule: Algorithm) -> Algorithm:
        """The rule on this wire."""
        return rule if self == Wire() else Compressed(rule, self.down, self.up)


@dataclass(frozen=True)
class Compressed(Around):
    """A rule whose payloads are packed.

    Up: the client adds what rounding took from its last upload, rounds, and remembers what that took now (error
    feedback, Seide et al., 2014; Karimireddy et al., 2019), so that over the rounds nothing is lost. The remembered
    residual ``R`` is a product, for the factors it was taken from are gone: rules may cut new ones every round. What
    rows and columns of this upload can carry of it goes along, ``(B + R A^+)(A + B^+ R (1 - A^+ A))``; the rest waits.
    Where every round draws fresh rows (FLoRA) that is little, and most of R is lost as without feedback. What is no
    update of a weight, such as mFedLoRU's factors of factors, is rounded without feedback.

    Down: a rounded ``S_i`` is what the client trains from, and no less good a start; but a rule that puts the returned
    in place of what it had would average the rounding into its state. The server knows what it would have sent, so it
    moves every returned factor by the difference: the client's step is taken from the exact ``S_i``.
    """

    down: Precision = "float32"
    up: Precision = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "summed", self.inner.summed)

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return packed(self.inner.download(state, client, rnd), self.down)

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        returned, kept, metrics = self.inner.local(worker, opened(sent), within("inner", memory), rnd)
        residuals: dict[str, LowRank] = {}
        if self.up != "float32":
            products = within("adapter", sent) or sent
            for name, M in returned.items():
                if isinstance(M, LowRank) and name in products:
                    M, residuals[name] = fed_back(M, memory.get(f"residual/{name}"), self.up)
                    returned = {**returned, name: M}
        return LocalResult(packed(returned, self.up), under("inner", kept) | under("residual", residuals), metrics)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        return self.inner.aggregate(state, [self._exact(state, reply, rnd) for reply in replies], rnd)

    def _exact(self, state: Tensors, reply: Reply, rnd: Round) -> Reply:
        """The reply as if its client had set out from what the rule sends, not from what arrived."""
        reply = _plain(reply)
        if self.down == "float32":
            return reply
        exact = replace(reply, sent=self.inner.download(state, reply.client, rnd))
        begun, wanted = self.inner.expected(reply), self.inner.expected(exact)
        return replace(
            exact, returned={name: _moved(M, begun[name], wanted[name]) for name, M in reply.returned.items()}
        )

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return self.inner.personal(_plain(reply), within("inner", memory))

    def expected(self, reply: Reply) -> Tensors:
        return self.inner.expected(_plain(reply))

    def trained(self, reply: Reply) -> Tensors:
        return self.inner.trained(_plain(reply))

    def shares(self, state: Tensors, replies: Sequence[Reply]) -> dict[str, float]:
        return self.inner.shares(state, [_plain(reply) for reply in replies])


def fed_back(M: LowRank, residual: LowRank | None, precision: Precision) -> tuple[LowRank, LowRank]:
    """What to send for ``M`` when ``residual`` is still owed, packed; and what is owed from now on, of M's rank.

    Of M, M with what its rows, its columns and both can carry of the residual, the one that leaves the least. Carried
    by both, the cross term ``B^+ R`` times ``R A^+`` is of the size ``|R|^2 / s_min(M)``: nothing beside a good M, and
    more than all of R where M is small or nearly of lower rank, where it would come back larger every round.
    """
    owed, tries = M, [M]
    if residual is not None:
        owed = M + residual
        by_rows = _shares(M.A, residual.A)  # R.A = by_rows A + a rest: (rank R, r)
        by_columns = _shares(M.B.T, residual.B.T)  # (rank R, r)
        B, A = M.B + residual.B @ by_rows, M.A + by_columns.T @ residual.A
        both = LowRank(B, M.A + by_columns.T @ (residual.A - by_rows @ M.A))
        tries = [both, LowRank(B, M.A), LowRank(M.B, A), M]
    sent = min((_packed(each, precision) for each in tries), key=lambda each: _left(owed, each))
    return sent, (owed - _opened(sent)).truncate(M.rank)


def _left(owed: LowRank, sent: LowRank) -> float:
    """``|| owed - sent ||_F``; infinite where the precision cannot hold what was to be sent."""
    opened = _opened(sent)
    finite = bool(torch.isfinite(opened.B).all() and torch.isfinite(opened.A).all())
    return (owed - opened).norm() if finite else float("inf")


def _shares(rows: Tensor, others: Tensor) -> Tensor:
    """``X (m, r)`` with ``X rows`` the nearest to ``others (m, n)`` that ``rows (r, n)`` make; dependent rows share."""
    rows = rows.double()
    gram = rows @ rows.T
    damping = torch.finfo(torch.float32).eps * gram.trace() or 1.0
    return torch.linalg.solve(gram + damping * torch.eye(len(gram)), rows @ others.double().T).T.float()


def _plain(reply: Reply) -> Reply:
    return replace(reply, sent=opened(reply.sent), returned=opened(reply.returned))


def _moved(value: Any, begun: Any, wanted: Any) -> Any:
    """``value + (wanted - begun)``, factor by factor; as it is where they do not fit each other."""
    if isinstance(value, LowRank):
        if value.rank != wanted.rank:
            return value
        return LowRank(value.B + (wanted.B - begun.B), value.A + (wanted.A - begun.A))
    return value + (wanted - begun) if value.is_floating_point() else value
