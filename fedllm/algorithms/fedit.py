"""FedIT (Zhang et al., 2024): the factors are averaged, ``B = sum p_i B_i`` and ``A = sum p_i A_i``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.core import Algorithm, Client, FedError, Model, Reply, Round, Tensors, names_of
from fedllm.lowrank import LowRank, fill
from fedllm.mean import mean_factors


@dataclass(frozen=True)
class FedIT(Algorithm):
    """Federated instruction tuning with one rank for all, ``p_i = n_i / n``.

    What is served, ``B A``, has cross terms ``B_i A_j`` that no client trained; the report says how large they are.
    """

    def validate(self, clients: Sequence[Client]) -> None:
        ranks = sorted({client.rank for client in clients})
        if len(ranks) > 1:
            raise FedError(
                f"fedit averages factors, so all clients need one rank, and these have {ranks}. "
                "Set clients.rank to one number, or take zero_padding, flexlora, flora or fedhl."
            )

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return {name: model.update.get(name, LowRank.zeros(*W.shape)) for name, W in model.weights.items()}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return {name: fill(W, client.rank, rnd.rng("fresh", name)) for name, W in state.items()}

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        return {name: mean_factors([reply.returned[name] for reply in replies], weights) for name in names_of(replies)}
