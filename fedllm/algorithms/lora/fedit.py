"""FedIT (Zhang et al., 2024): the factors are averaged, ``B = sum p_i B_i`` and ``A = sum p_i A_i``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors, names_of
from fedllm.errors import FedError
from fedllm.lowrank import LowRank, fill
from fedllm.mean import mean_values


@dataclass(frozen=True)
class FedIT(Algorithm):
    """Federated instruction tuning with one rank for all, ``p_i = n_i / n``.

    What is served, ``B A``, has cross terms ``B_i A_j`` that no client trained; the report says how large they are.
    """

    summed: ClassVar[bool] = True
    plain_mean: ClassVar[bool] = True
    averages_factors: ClassVar[bool] = True

    def validate(self, clients: Sequence[Client]) -> None:
        of_one_rank(clients, "zero_padding, flexlora, flora or fedhl")

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        start = model.adapters(max(client.rank for client in clients))
        return {name: model.update.get(name, value) for name, value in start.items()}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return started(state, client.rank, rnd)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        return {name: mean_values([reply.returned[name] for reply in replies], weights) for name in names_of(replies)}


def of_one_rank(clients: Sequence[Client], others: str) -> None:
    """Raises FedError where factors of these clients cannot be averaged; ``others`` are the rules that can."""
    ranks = sorted({client.rank for client in clients})
    if len(ranks) > 1:
        raise FedError(
            f"this rule averages factors, so all clients need one rank, and these have {ranks}. "
            f"Set clients.rank to one number, or take {others}."
        )


def started(adapters: Tensors, r: int, rnd: Round) -> dict[str, Any]:
    """What a round's clients start from: products of rank ``r``, with fresh directions where they have none."""
    return {
        name: fill(value, r, rnd.rng("fresh", name)) if isinstance(value, LowRank) else value
        for name, value in adapters.items()
    }
