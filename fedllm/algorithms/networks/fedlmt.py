"""FedLMT (Liu et al., 2024): all clients train one low-rank network, and its factors are averaged; no SVD ever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.config.types import NonNegative, Positive, Whole
from fedllm.core import Client, ClientWorker, LocalResult, Model, Penalty, Round, Tensors
from fedllm.errors import FedError
from fedllm.models.factorized import decay, factorize, ranks, split_weights

LEVELS = {"b1": (1, 0.03), "b2": (3, 0.15), "b3": (5, 0.4)}
"""Capacity level -> rho and alpha (Table 1). A client of level b4 can train any of them; none is its own."""


@dataclass(frozen=True)
class FedLMT(FedAvg):
    """Layers after the first ``rho`` are ``U V^T`` of rank ``alpha c_out`` from the first round to the last.

    One network for all: in a mixed federation that of the weakest client.

    Args:
        rho: numbered layers that stay whole; by default the weakest level's.
        alpha: rank ratio, likewise. The rank is ``round(alpha c_out)``, as the paper's counts need.
        decay: regulariser -> coefficient, of the sum over the factorised layers: ``frobenius`` (the paper's), ``l2``,
            ``kronecker``, or two of them.
        start: factors drawn as convolutions are (``kaiming``), or a full network's best approximation (``spectral``).
    """

    plain_mean: ClassVar[bool] = True

    rho: Whole | None = None
    alpha: Positive | None = None
    decay: Mapping[str, NonNegative] = field(default_factory=dict)
    start: Literal["kaiming", "spectral"] = "kaiming"

    def validate(self, clients: Sequence[Client]) -> None:
        self.capacity(clients)

    def capacity(self, clients: Sequence[Client]) -> tuple[int, float]:
        """``rho`` and ``alpha`` for everybody."""
        if self.rho is not None and self.alpha is not None:
            return self.rho, self.alpha
        levels = sorted({client.level for client in clients} & LEVELS.keys())
        if not levels:
            raise FedError(
                "fedlmt trains the network of the weakest client's level, b1 to b3, and no client has one of these: "
                "give algorithm.rho and algorithm.alpha, or clients.levels with b1, b2 or b3 in it."
            )
        rho, alpha = LEVELS[levels[0]]
        return (rho if self.rho is None else self.rho), (alpha if self.alpha is None else self.alpha)

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        chosen = ranks(model.make(), model.anatomy, *self.capacity(clients))
        if self.start == "spectral":
            return split_weights(model.weights, chosen, torch.Generator().manual_seed(0))
        return model.draw(factorize(model.make(), chosen))

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        return worker.train(sent, memory, rnd, penalty=penalty(self.decay))


def penalty(coefficients: Mapping[str, float]) -> Penalty | None:
    """The decay as a term of the loss, or None where there is none."""
    return partial(decay, coefficients=coefficients) if coefficients else None
