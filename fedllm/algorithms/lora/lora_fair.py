"""LoRA-FAIR (Bian, Wang, Zhang, Xu, ICCV 2025): the averaged B is turned until B A points as the mean product does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedllm.algorithms.lora.fedit import FedIT
from fedllm.config.types import NonNegative, Positive, Whole
from fedllm.core import Reply, Round, Tensors, names_of
from fedllm.lowrank import LowRank
from fedllm.mean import mean_factors, mean_products


@dataclass(frozen=True)
class LoRAFAIR(FedIT):
    """``B + D`` and A are sent, where D minimises ``1 - cos(S, (B + D) A) + regularization |D|^2``.

    B and A are FedIT's means and ``S = sum p_i B_i A_i``; the cosine is that of the matrices as vectors. Plain gradient
    descent from ``D = 0``, and the best of its iterates, so that the cosine never falls.

    Args:
        regularization: 0.01 in the paper. The cosine's gradient grows as ``1 / |B|``: it binds where B is large.
        steps: of gradient descent; 0 is FedIT. Not stated in the paper.
        learning_rate: of gradient descent.
    """

    differs: ClassVar[str] = (
        "1 - cos and the square of |D|, as its re-implementations read it; steps and their length are not stated"
    )

    regularization: NonNegative = 0.01
    steps: Whole = 1000
    learning_rate: Positive = 0.01

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        after = {}
        for name in names_of(replies):
            updates = [reply.returned[name] for reply in replies]
            after[name] = self._corrected(mean_factors(updates, weights), mean_products(updates, weights))
        return after

    def _corrected(self, mean: LowRank, S: LowRank) -> LowRank:
        """``(B + D) A``.

        Every iterate is ``[B, C] Y`` with ``C = S A^T`` and Y ``(2r, r)``: a step costs ``r^3``, whatever B's height.
        """
        A, B, r = mean.A.double(), mean.B.double(), mean.rank
        C, G = S.B.double() @ (S.A.double() @ A.T), A @ A.T  # (d_out, r), (r, r)
        basis = torch.cat([B, C], dim=1)
        K = basis.T @ basis
        start, towards = torch.eye(2 * r, dtype=K.dtype).split(r, dim=1)  # B and C in this basis
        n = S.norm()
        Y, best, least = start, start, float("inf")
        for _ in range(self.steps + 1):
            along, m2 = float((towards * (K @ Y)).sum()), float((Y * (K @ Y @ G)).sum())
            if n == 0.0 or m2 <= 0.0:
                break
            m, D = m2**0.5, Y - start
            value = 1 - along / (n * m) + self.regularization * float((D * (K @ D)).sum())
            if value < least:
                best, least = Y, value
            gradient = -towards / (n * m) + along / (n * m * m2) * (Y @ G) + 2 * self.regularization * D
            Y = Y - self.learning_rate * gradient
        return mean if best is start else LowRank((basis @ best).to(mean.B), mean.A)
