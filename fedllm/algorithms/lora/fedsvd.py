"""FedSVD (Lee et al., NeurIPS 2025): FFA-LoRA whose A becomes orthonormal again, by an SVD of the averaged product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.algorithms.lora.ffa_lora import FFALoRA
from fedllm.config.types import Count
from fedllm.core import ClientWorker, LocalResult, Reply, Round, Tensors
from fedllm.lowrank import LowRank


@dataclass(frozen=True)
class FedSVD(FFALoRA):
    """``(sum p_i B_i) A = U S V^T``, then ``A = V^T`` and ``B = U S``: the product stays, the basis follows it.

    Args:
        period: rounds from one SVD to the next; ``null`` takes none, which is FFA-LoRA.
    """

    period: Count | None = 1

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        if self.period is None:
            return super().local(worker, sent, memory, rnd)
        returned, _, metrics = super().local(worker, sent, {}, rnd)  # old moments are of other coordinates
        return LocalResult(returned, {}, metrics)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        averaged = super().aggregate(state, replies, rnd)
        if self.period is None or rnd.index % self.period:
            return averaged
        return {name: _orthonormal_rows(M) for name, M in averaged.items()}


def _orthonormal_rows(M: LowRank) -> LowRank:
    """The same product with ``A A^T = I``, null directions included, so that they can train."""
    U, S, Vh = M.svd()
    return LowRank(U * S, Vh)
