"""Standalone (Yi et al., 2023, as the baseline of FedLoRA): every client trains its own network, nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors, under


@dataclass(frozen=True)
class Standalone(Algorithm):
    """``min f_k(omega_k)``, in the rounds that the client is drawn for: what the other rules must be better than.

    The server knows no more than how many rounds there were.
    """

    network: ClassVar[str] = "plain"
    any_model: ClassVar[bool] = True

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return {"rounds": torch.zeros(1)}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return {}

    def local(
        self, worker: Any, sent: Tensors, memory: Tensors, rnd: Round
    ) -> tuple[Tensors, Tensors, dict[str, float]]:
        omega, _, metrics = worker.train(own(worker, memory), {}, rnd)
        return {}, omega, scored(worker, omega, metrics)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        return {"rounds": state["rounds"] + 1}

    def served(self, state: Tensors) -> Tensors:
        """No model: there is none but the clients'."""
        return under("shared", state)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return memory


def own(worker: Any, memory: Tensors) -> Tensors:
    """``omega_k``: what the client remembers, or at its first round what it draws from the run's seed."""
    return memory or worker.model.weights


def scored(worker: Any, omega: Tensors, metrics: Mapping[str, float]) -> dict[str, float]:
    """With the scores of the client's own network on its own test examples."""
    return {**metrics, **{f"own_{key}": value for key, value in worker.score(omega).items()}}
