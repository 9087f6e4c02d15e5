"""FedRot-LoRA (Zhang, Kim, Cha, Vikalo, ICML 2026): FedIT, but clients' factors are first turned to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.algorithms.lora.fedit import FedIT
from fedllm.config.types import Share
from fedllm.core import Reply, Round, Tensors, names_of
from fedllm.lowrank import LowRank, nearest_rotation
from fedllm.mean import mean_factors


@dataclass(frozen=True)
class FedRotLoRA(FedIT):
    """``(B_i R_i)(R_i^T A_i) = B_i A_i`` for a rotation ``R_i``: the factors of one product that are averaged.

    Odd rounds turn A_i towards the A that was sent, even rounds B_i towards the B: ``R*`` is the rotation that brings
    it nearest, and ``R_i`` the rotation nearest to ``(1 - amount) I + amount R*``. Where B was zero nothing turns.

    Args:
        amount: lambda of the paper, which finds 0.4 to 0.6 best; 0 is FedIT. The authors' code defaults to 1 with
            reflections allowed.
    """

    differs: ClassVar[str] = "lambda 0.5 and rotations alone; the released code allows reflections"

    amount: Share = 0.5

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        turned = {
            name: [self._turned(reply.returned[name], reply.sent[name], bool(rnd.index % 2)) for reply in replies]
            for name in names_of(replies)
        }
        return {name: mean_factors(updates, weights) for name, updates in turned.items()}

    def _turned(self, M: LowRank, sent: LowRank, by_rows: bool) -> LowRank:
        if self.amount == 0.0 or not bool(sent.B.any()):
            return M
        overlap = (M.A.double() @ sent.A.double().T) if by_rows else (M.B.double().T @ sent.B.double())  # (r, r)
        R = self._partly(nearest_rotation(overlap))
        return LowRank((M.B.double() @ R).to(M.B), (R.T @ M.A.double()).to(M.A))

    def _partly(self, R: Tensor) -> Tensor:
        between = (1 - self.amount) * torch.eye(len(R), dtype=R.dtype) + self.amount * R
        at_half_a_turn = torch.linalg.matrix_norm(between, ord=-2) < 1e-6  # no rotation is nearest
        return R if at_half_a_turn else nearest_rotation(between)
