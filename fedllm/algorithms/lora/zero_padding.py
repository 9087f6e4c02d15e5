"""Zero-padding (Cho et al., HetLoRA, 2024): factors of every rank padded with zeros to the largest, then averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedllm.algorithms.lora.fedit import FedIT
from fedllm.core import Client, Reply, Round, Tensors, names_of
from fedllm.lowrank import LowRank, fill
from fedllm.mean import mean_factors, pad


@dataclass(frozen=True)
class LeadingColumns(FedIT):
    """FedIT's state for mixed ranks: client i trains the first ``r_i`` columns of B and rows of A."""

    def validate(self, clients: Sequence[Client]) -> None:
        """Any mix of ranks will do."""

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return {name: fill(W.leading(client.rank), client.rank, rnd.rng("fresh", name)) for name, W in state.items()}

    def truncated(self, state: Tensors, client: Client) -> float:
        lost = [LowRank(W.B[:, client.rank :], W.A[client.rank :]).norm() for W in state.values()]
        return sum(error**2 for error in lost) ** 0.5


@dataclass(frozen=True)
class ZeroPadding(LeadingColumns):
    """Factors are padded with zeros to the largest rank of the cohort, then averaged as FedIT does.

    Args:
        weights: ``fedavg`` for ``p_i = n_i / n``; ``norm`` for HetLoRA's, proportional to ``|| M_i ||_F`` over
            the whole model.

    Small clients return nothing for the later directions, so the mean dilutes what the large ones learned there.
    """

    weights: Literal["fedavg", "norm"] = "fedavg"

    summed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.weights == "norm":  # the replies decide about their own weights
            object.__setattr__(self, "summed", False)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        served = {}
        for name in names_of(replies):
            updates = [reply.returned[name] for reply in replies]
            r_max = max(update.rank for update in updates)
            served[name] = mean_factors([pad(update, r_max) for update in updates], weights)
        return served

    def shares(self, state: Tensors, replies: Sequence[Reply]) -> dict[str, float]:
        if self.weights == "fedavg":
            return super().shares(state, replies)
        norms = {r.client.id: sum(M.norm() ** 2 for M in r.returned.values()) ** 0.5 for r in replies}
        total = sum(norms.values())
        if total == 0.0:  # nobody moved: every share is as good as another
            return {client: 1 / len(norms) for client in norms}
        return {client: norm / total for client, norm in norms.items()}
