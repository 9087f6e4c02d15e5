"""FFA-LoRA (Sun, Li, Li, Ding, ICLR 2024): A is frozen as it was drawn, and the Bs are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedllm.algorithms.lora.fedit import FedIT, of_one_rank, started
from fedllm.core import Client, ClientWorker, LocalResult, Reply, Round, Tensors, under, within
from fedllm.mean import mean


@dataclass(frozen=True)
class FFALoRA(FedIT):
    """``W = (sum p_i B_i) A``: exactly ``sum p_i B_i A``, with ``p_i = n_i / n`` and one rank for all.

    A enters the state in the first round, from what was sent, and stays to the bit. ``B/name`` alone returns.
    """

    summed: ClassVar[bool] = True
    plain_mean: ClassVar[bool] = True

    def validate(self, clients: Sequence[Client]) -> None:
        of_one_rank(clients, "zero_padding, rbla, flexlora, raflora, flora or fedhl")

    def factor(self, sent: Tensors) -> Literal["B", "A"]:
        """The factor that trains, travels back and is averaged."""
        return "B"

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return under("adapter", started(state, client.rank, rnd))

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        factor = self.factor(sent)
        trained, moments, metrics = worker.train(within("adapter", sent), within(factor, memory), rnd, factors=factor)
        returned = under(factor, {name: getattr(M, factor) for name, M in trained.items()})
        return LocalResult(returned, {**memory, **under(factor, moments)}, metrics)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p, factor = self.shares(state, replies), self.factor(replies[0].sent)
        weights = [p[reply.client.id] for reply in replies]
        return {
            name: replace(M, **{factor: mean([reply.returned[f"{factor}/{name}"] for reply in replies], weights)})
            for name, M in within("adapter", replies[0].sent).items()  # all were sent the same
        }

    def expected(self, reply: Reply) -> Tensors:
        factor = self.factor(reply.sent)
        return under(factor, {name: getattr(M, factor) for name, M in within("adapter", reply.sent).items()})

    def trained(self, reply: Reply) -> Tensors:
        factor = self.factor(reply.sent)
        return {
            name: replace(M, **{factor: reply.returned[f"{factor}/{name}"]})
            for name, M in within("adapter", reply.sent).items()
        }

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return self.trained(reply)
