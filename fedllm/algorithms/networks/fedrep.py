"""FedRep (Collins et al., 2021): a shared body, and a head of their own for every client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.algorithms.personal import personal_step, shared_part
from fedllm.config.types import Share, Whole
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors
from fedllm.errors import FedError


@dataclass(frozen=True)
class FedRep(FedAvg):
    """Every round the head first, the body frozen; then the body, the head frozen; the body is averaged.

    Args:
        split: number of the last shared layer; by default all but the last one are shared.
        head_share: of the round's steps, for the head: half of them, so that the round costs what other methods' does.
    """

    split: Whole | None = None
    head_share: Share = 0.5

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return shared_part(model, self._last(model))

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        head = memory or {name: W for name, W in worker.model.weights.items() if name not in sent}
        phases = ((self.head_share, lambda name: name in head), (1 - self.head_share, lambda name: name in sent))
        return personal_step(worker, sent, head, rnd, phases=phases)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return {**memory, **reply.returned}

    def _last(self, model: Model) -> int:
        most = len(model.anatomy.layers) - 1
        if self.split is not None and self.split > most:
            raise FedError(
                f"split is the number of the last shared layer, 0 to {most} for this model, got {self.split}."
            )
        return most if self.split is None else self.split
