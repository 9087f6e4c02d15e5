"""DepthFL (Kim et al., 2023): clients train the first stages, an exit after each, and the exits teach each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.config.types import NonNegative, Positive
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within
from fedllm.models import submodel


@dataclass(frozen=True)
class DepthFL(FedAvg):
    """``L = sum_i CE_i + w(t) / (b - 1) sum_i sum_{j != i} tau^2 KL(softmax(z_j / tau) || softmax(z_i / tau))``.

    The teacher ``z_j`` gets no gradient. Served are the exits that a client trains; their logits are averaged.

    Args:
        distillation: w, after its ramp ``exp(-5 (1 - t / t_1)^2)``.
        ramp: ``t_1`` as a share of the rounds.
        temperature: tau.
        losses: of ``all`` exits, or of the ``last`` one alone.
        weighting: ``uniform``, or ``data``.
    """

    distillation: NonNegative = 1.0
    ramp: NonNegative = 0.3
    temperature: Positive = 1.0
    losses: Literal["all", "last"] = "all"
    weighting: Literal["data", "uniform"] = "uniform"

    network: ClassVar[str] = "exits"

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        depths = [client.depth or len(model.anatomy.blocks) - 1 for client in clients]
        held = submodel.at_depth(model.anatomy, {**model.weights, **model.update}, max(depths))
        return {"anatomy": submodel.written(model.anatomy), **under("weights", held)}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return submodel.at_depth(submodel.read(state["anatomy"]), within("weights", state), client.depth)

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        return worker.train(sent, memory, rnd, loss=lambda z, y: self.loss(z, y, rnd))

    def loss(self, z: tuple[Tensor, ...], y: Tensor, rnd: Round) -> Tensor:
        """Of the exits' logits ``(B, C)`` each and the classes ``(B,)``."""
        exits = z if self.losses == "all" else z[-1:]
        total = torch.stack([torch.nn.functional.cross_entropy(one, y) for one in exits]).sum()
        w = self.weight(rnd)
        if w == 0 or len(exits) == 1:
            return total
        pairs = [self._taught(a, b) for i, a in enumerate(exits) for j, b in enumerate(exits) if i != j]
        return total + w / (len(exits) - 1) * torch.stack(pairs).sum()

    def weight(self, rnd: Round) -> float:
        """w(t)."""
        end = self.ramp * rnd.rounds
        done = min(1.0, rnd.index / end) if end else 1.0
        return self.distillation * math.exp(-5 * (1 - done) ** 2)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        """Each weight over the clients that have it."""
        p = self.shares(state, replies)
        held = [reply.returned for reply in replies]
        weights = within("weights", state)
        after = submodel.scatter_mean(weights, held, [{}] * len(held), [p[reply.client.id] for reply in replies])
        return {"anatomy": state["anatomy"], **under("weights", after)}

    def served(self, state: Tensors) -> Tensors:
        return within("weights", state)

    def _taught(self, student: Tensor, teacher: Tensor) -> Tensor:
        tau = self.temperature
        log_p, log_q = (student / tau).log_softmax(-1), (teacher.detach() / tau).log_softmax(-1)
        return tau**2 * torch.nn.functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
