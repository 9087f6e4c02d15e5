"""FLoRA (Wang et al., 2024): adapters are stacked, without noise, and every round starts a fresh one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedllm.core import (
    Algorithm,
    Client,
    ClientWorker,
    LocalResult,
    Model,
    Reply,
    Round,
    Tensors,
    names_of,
    under,
    within,
)
from fedllm.lowrank import LowRank, cheapest, fill, plus
from fedllm.mean import mean_products


@dataclass(frozen=True)
class FLoRA(Algorithm):
    """``W <- W + sum p_i B_i A_i``, the sum kept as the stack ``[p_1 B_1, ..., p_m B_m] [A_1; ...; A_m]``.

    Client i is sent all of ``W``, frozen, and an adapter of its rank with a random A and ``B = 0``. The broadcast grows
    by ``sum r_i`` ranks a round, until the dense matrix is smaller. ``p_i = n_i / n``.
    """

    any_rank: ClassVar[bool] = True
    summed: ClassVar[bool] = True

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return {name: model.update.get(name, LowRank.zeros(*W.shape)) for name, W in model.weights.items()}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        fresh = {n: fill(LowRank.zeros(*W.shape), client.rank, rnd.rng("fresh", n)) for n, W in state.items()}
        return under("frozen", state) | under("adapter", fresh)

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        return worker.train(within("adapter", sent), memory, rnd, frozen=within("frozen", sent))

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        return {
            name: cheapest(plus(state[name], self.increment([reply.returned[name] for reply in replies], weights)))
            for name in names_of(replies)
        }

    def increment(self, updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        """What a round adds to one module."""
        return mean_products(updates, weights)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        frozen = within("frozen", reply.sent)
        return {name: plus(frozen[name], update) for name, update in reply.returned.items()}
