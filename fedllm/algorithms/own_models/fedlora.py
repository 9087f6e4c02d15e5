"""FedLoRA (Yi et al., 2023): clients keep networks of their own, and share a small adapter on what these see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.algorithms.personal import COSTS, head_shape, own, scored
from fedllm.config.types import Count, Share
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.models.build import describe
from fedllm.models.cnn import Adapter
from fedllm.models.paired import Beside, joined, part_of


@dataclass(frozen=True)
class FedLoRA(FedAvg):
    """Step 1, the adapter theta frozen: ``(1 - mu) CE(A(R), y) + mu CE(h_k(R), y)`` for all of the network omega_k.

    Step 2, omega_k frozen: ``CE(A(R), y)`` for theta, which travels and is averaged. Either takes the worker's epochs.
    Clients use omega_k alone. R is the last layer's input in networks that differ, where A factorises that layer
    (``decomposition``), or FC1's output in networks that are alike, where A is a smaller classifier (``direct``).

    Args:
        mu: what the network's own classes count in step 1; in the paper .5 to .9, more is better.
        adapter: see above.
        hidden: the adapter's inner width; in the paper 20 to 80, and 100 to 500 where ``direct``.
    """

    mu: Share = 0.9
    adapter: Literal["decomposition", "direct"] = "decomposition"
    hidden: Count = 80

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return model.draw(describe(lambda: self.module(model)))

    def module(self, model: Model) -> Adapter:
        """A, for this network."""
        classes, d = head_shape(model)
        if self.adapter == "direct":
            before = model.weights[f"{model.anatomy.layers[-2]}.weight"]  # FC2, which reads FC1's output
            if before.ndim != 2:
                raise FedError(
                    "algorithm.adapter=direct reads a linear layer before the last two: take model.name=yi1."
                )
            d = before.shape[1]
        return Adapter(self.adapter, d, self.hidden, classes)

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        network = partial(self.beside, worker.model)
        train = partial(worker.train, memory={}, rnd=rnd, forward=self.outputs, network=network)
        theta = joined(adapter=sent)
        first, _, metrics = train(joined(own=own(worker, memory)), frozen=theta, loss=self.of_network)
        second, _, more = train(theta, frozen=first, loss=self.of_adapter)
        omega = part_of("own", first)
        costs = {key: metrics[key] + more[key] for key in COSTS if key in more}
        return LocalResult(part_of("adapter", second), omega, scored(worker, omega, {**metrics, **costs}))

    def beside(self, model: Model) -> Beside:
        return Beside(own=model.make(), adapter=describe(lambda: self.module(model)))

    def outputs(self, net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """``h_k(R)`` and ``A(R)``, ``(B, C)`` each."""
        seen = net.own.features(x)
        return seen.logits, net.adapter(seen.hidden if self.adapter == "direct" else seen.representation)

    def of_network(self, z: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return (1 - self.mu) * cross_entropy(z[1], y) + self.mu * cross_entropy(z[0], y)

    def of_adapter(self, z: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return cross_entropy(z[1], y)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return memory
