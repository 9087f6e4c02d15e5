"""FML (Shen et al., 2020): a small network travels, and it and every client's own network teach each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.algorithms.personal import own, scored
from fedllm.config.types import Share
from fedllm.core import ClientWorker, LocalResult, Reply, Round, Tensors
from fedllm.models.paired import Beside, joined, part_of


@dataclass(frozen=True)
class FML(FedAvg):
    """``a CE_p + (1 - a) KL(z_s || z_p)`` for the private network, ``b CE_s + (1 - b) KL(z_p || z_s)`` for the shared.

    Both take their steps together; a teacher gets no gradient. The shared network is averaged, clients use their own.

    Args:
        a, b: what their own labels count to each of the two.
    """

    a: Share = 0.5
    b: Share = 0.5

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        trained, _, metrics = worker.train(
            joined(own=own(worker, memory), shared=sent), {}, rnd,
            network=lambda: Beside(own=worker.model.make(), shared=worker.shared.make()),
            forward=lambda net, x: (net.own(x), net.shared(x)),
            loss=self.loss,
        )  # fmt: skip
        omega = part_of("own", trained)
        return LocalResult(part_of("shared", trained), omega, scored(worker, omega, metrics))

    def loss(self, z: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        """Of the private and the shared logits ``(B, C)``."""
        p, s = z
        private = self.a * cross_entropy(p, y) + (1 - self.a) * taught(p, by=s)
        return private + self.b * cross_entropy(s, y) + (1 - self.b) * taught(s, by=p)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return memory


def taught(z: Tensor, by: Tensor) -> Tensor:
    """``KL(softmax(by) || softmax(z))``, the mean over the batch."""
    return kl_div(log_softmax(z, 1), log_softmax(by.detach(), 1), reduction="batchmean", log_target=True)
