"""LG-FedAvg (Liang et al., 2020): every client has its own representation, and one last layer is shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.algorithms.personal import head, personal_step
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under


@dataclass(frozen=True)
class LGFedAvg(FedAvg):
    """All layers train together; the last one travels and is averaged."""

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return head(model)

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        private = memory or {name: W for name, W in worker.model.weights.items() if name not in sent}
        return personal_step(worker, sent, private, rnd)

    def served(self, state: Tensors) -> Tensors:
        """The shared layer, which is no network that could be scored."""
        return under("shared", state)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return {**memory, **reply.returned}
