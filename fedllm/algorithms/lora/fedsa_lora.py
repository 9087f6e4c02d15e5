"""FedSA-LoRA (Guo et al., ICLR 2025): A is averaged and shared, and every client keeps a B of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedllm.algorithms.lora.fedit import FedIT, of_one_rank, started
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within
from fedllm.lowrank import LowRank
from fedllm.mean import mean


@dataclass(frozen=True)
class FedSALoRA(FedIT):
    """``A = sum p_i A_i`` with ``p_i = n_i / n``; client i's model is ``B_i A``, and ``B_i`` never leaves it.

    Both factors train. There is no global update: what is served is the base model, and what counts is
    ``eval.clients=true``. State: A, beside a B of zeros.
    """

    plain_mean: ClassVar[bool] = True

    def validate(self, clients: Sequence[Client]) -> None:
        of_one_rank(clients, "zero_padding, rbla, flexlora, raflora, flora or fedhl")

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return {name: LowRank(torch.zeros_like(M.B), M.A) for name, M in super().init(model, clients).items()}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        A = {name: M.A for name, M in started(state, client.rank, rnd).items()}
        return under("A", A) | under("height", {name: torch.tensor(M.shape[0]) for name, M in state.items()})

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        start = {name: LowRank(memory.get(f"B/{name}", M.B), M.A) for name, M in _from_zero(sent).items()}
        trained, moments, metrics = worker.train(start, within("moments", memory), rnd)
        kept = under("B", {name: M.B for name, M in trained.items()}) | under("moments", moments)
        return LocalResult(under("A", {name: M.A for name, M in trained.items()}), kept, metrics)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        return {
            name: LowRank(M.B, mean([reply.returned[f"A/{name}"] for reply in replies], weights))
            for name, M in _from_zero(replies[0].sent).items()
        }

    def expected(self, reply: Reply) -> Tensors:
        return under("A", within("A", reply.sent))

    def trained(self, reply: Reply) -> Tensors:
        """Zeros: without its B an update cannot be told."""
        return {name: LowRank(M.B, reply.returned[f"A/{name}"]) for name, M in _from_zero(reply.sent).items()}

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return {name: LowRank(memory.get(f"B/{name}", M.B), M.A) for name, M in self.trained(reply).items()}


def _from_zero(sent: Tensors) -> dict[str, LowRank]:
    """The A that was sent, beside a B of zeros."""
    A, height = within("A", sent), within("height", sent)
    return {name: LowRank(rows.new_zeros(int(height[name]), len(rows)), rows) for name, rows in A.items()}
