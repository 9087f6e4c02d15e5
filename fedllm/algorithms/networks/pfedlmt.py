"""pFedLMT (Liu et al., 2024): the first layers are shared and whole, the rest is each client's own, at its own rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.algorithms.networks.fedhm import ALPHAS
from fedllm.algorithms.networks.fedlmt import penalty
from fedllm.algorithms.personal import personal_step, shared_part
from fedllm.config.types import NonNegative, Positive, Whole
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors
from fedllm.models.factorized import ranks, split_weights


@dataclass(frozen=True)
class PFedLMT(FedAvg):
    """``min over p, q_1 ... q_N of sum f_i(p, q_i)``: p travels and is averaged, q_i never leaves its client.

    All clients start from one full network: ``q_i`` is its best approximation at the client's rank.

    Args:
        rho: the last shared layer.
        alphas: rank ratio of q by capacity level; a client without a level has b4's.
        alpha: one ratio for all instead.
        mode: in a round, first q and then p (``alternate``, half of the steps each), or both at once (Algorithm 3).
        decay: as FedLMT's.
    """

    rho: Whole = 9
    alphas: Mapping[str, Positive] = field(default_factory=lambda: dict(ALPHAS))
    alpha: Positive | None = None
    mode: Literal["alternate", "simultaneous"] = "alternate"
    decay: Mapping[str, NonNegative] = field(default_factory=dict)

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        model.anatomy.factorable(self.rho)  # refuses a rho that this network has no layers for
        return shared_part(model, self.rho)

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        q = memory or self.custom(worker.model, worker.client, sent)
        halves = ((0.5, lambda name: name in q), (0.5, lambda name: name in sent))
        phases = halves if self.mode == "alternate" else ((1.0, lambda name: True),)
        return personal_step(worker, sent, q, rnd, phases=phases, penalty=penalty(self.decay))

    def custom(self, model: Model, client: Client, shared: Tensors) -> dict[str, Any]:
        """``q_i`` before the client's first round."""
        alpha = self.alphas[client.level or "b4"] if self.alpha is None else self.alpha
        own = {name: W for name, W in model.weights.items() if name not in shared}
        return split_weights(own, ranks(model.make(), model.anatomy, self.rho, alpha), torch.Generator().manual_seed(0))

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return {**memory, **reply.returned}
