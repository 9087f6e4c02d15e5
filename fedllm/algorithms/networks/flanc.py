"""FLANC (Mei et al., 2022): clients of every width compose their convolutions from the same small bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.config.types import NonNegative, Positive
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within
from fedllm.models.flanc import orthogonality

FACTORS = {"b1": 0.25, "b2": 0.75, "b3": 1.25, "b4": 1.75}
"""Capacity level -> width multiplier f (FedLMT's Table 1)."""


@dataclass(frozen=True)
class FLANC(FedAvg):
    """Bases are averaged over all clients, everything else (coefficients, norms, head) over those of the same width.

    The loss has ``orthogonality sum mean((B B^T - I)^2)`` over the bases. Served is the widest network.

    Args:
        factors: width multiplier by capacity level; a client without a level has b4's.
        orthogonality: the term's coefficient.
        weighting: ``uniform``, or ``data``.
    """

    factors: Mapping[str, Positive] = field(default_factory=lambda: dict(FACTORS))
    orthogonality: NonNegative = 10.0
    weighting: Literal["data", "uniform"] = "uniform"

    network: ClassVar[str] = "flanc"

    def factor(self, client: Client) -> float:
        return self.factors[client.level or "b4"]

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        state: dict[str, Any] = {}
        for f in sorted({self.factor(client) for client in clients}):  # the widest one's bases are kept
            weights = model.draw(model.make(width=f))
            state |= under("bases", {name: t for name, t in weights.items() if name.endswith(".basis")})
            state |= under(f"width/{f}", {name: t for name, t in weights.items() if not name.endswith(".basis")})
        return state

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return self._network(state, self.factor(client))

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        return worker.train(sent, memory, rnd, penalty=lambda net: self.orthogonality * orthogonality(net))

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        after = {**state}
        bases = within("bases", state)
        after |= under("bases", self.averaged(state, [_only(reply, bases, kept=True) for reply in replies]))
        for f in {self.factor(reply.client) for reply in replies}:
            alike = [_only(reply, bases, kept=False) for reply in replies if self.factor(reply.client) == f]
            after |= under(f"width/{f}", self.averaged(state, alike))
        return after

    def served(self, state: Tensors) -> Tensors:
        widths = {float(name.split("/")[1]) for name in state if name.startswith("width/")}
        return self._network(state, max(widths))

    def _network(self, state: Tensors, f: float) -> Tensors:
        return {**within("bases", state), **within(f"width/{f}", state)}


def _only(reply: Reply, bases: Tensors, *, kept: bool) -> Reply:
    chosen = {name: tensor for name, tensor in reply.returned.items() if (name in bases) == kept}
    return Reply(reply.client, reply.sent, chosen, reply.metrics)
