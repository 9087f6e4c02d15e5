"""FedMomentum (Yan et al., 2026): the mean product's leading directions go on training, the rest joins the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedllm.algorithms.lora.fedex_lora import Residual
from fedllm.config.types import SomeShare
from fedllm.core import ClientWorker, LocalResult, Round, Tensors
from fedllm.lowrank import LowRank, dominant
from fedllm.mean import mean_products


@dataclass(frozen=True)
class FedMomentum(Residual):
    """``sum p_i M_i = U S V^T``: the first r directions are the adapter, balanced, and those up to q join W.

    Args:
        energy: q is the fewest directions that hold this share of the sum of squared singular values.
    """

    energy: SomeShare = 0.9999

    averages_factors: ClassVar[bool] = False  # of the products alone

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        returned, _, metrics = super().local(worker, sent, {}, rnd)  # old moments are of other coordinates
        return LocalResult(returned, {}, metrics)

    def parted(self, updates: Sequence[LowRank], weights: Sequence[float]) -> tuple[LowRank, LowRank]:
        r, mean = updates[0].rank, mean_products(updates, weights).balanced()
        rest = dominant(mean, self.energy)
        return mean.leading(r), LowRank(rest.B[:, r:], rest.A[r:])
