"""Server optimizers (Reddi et al., ICLR 2021; FedAvgM of Hsu, Qi, Brown, 2019): the mean update is a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedllm.algorithms.compositions.leaves import is_statistic, joined, leaves
from fedllm.config.types import PartShare, Positive
from fedllm.core import Algorithm, Around, Client, Model, Reply, Round, Tensors, described, under, within
from fedllm.errors import FedError
from fedllm.mean import mean

Moments = Mapping[str, Tensor]


@dataclass(frozen=True)
class Server:
    """How the server goes on from the mean of what its clients returned.

    Args:
        step: ``mean`` takes it as it is; ``avgm``, ``adagrad``, ``adam`` and ``yogi`` step towards it.
        learning_rate: eta. By default 1 of ``avgm`` and 0.001 of the others, OpenFedLLM's for LoRA.
        beta: of ``avgm``'s momentum, and the first of ``adam`` and ``yogi``. 0.9 is the papers'.
        beta2: the second of ``adam`` and ``yogi``.
        tau: added to the root, and the start of the second moment, ``tau^2``.
    """

    step: Literal["mean", "avgm", "adagrad", "adam", "yogi"] = "mean"
    learning_rate: Positive | None = None
    beta: PartShare = 0.9
    beta2: PartShare = 0.99
    tau: Positive = 1e-3

    def around(self, rule: Algorithm) -> Algorithm:
        """The rule with this step."""
        return rule if self.step == "mean" else ServerStep(rule, self)

    @property
    def eta(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.step == "avgm" else 1e-3


@dataclass(frozen=True)
class ServerStep(Around):
    """``x + step(Delta)`` in place of the mean, ``Delta = sum p_i (y_i - x)``: entrywise, of B and of A apart.

    ``x`` is what was sent and ``y_i`` what client i returned. All replies are replaced by the one that was stepped to,
    and the mean of equals is that value, so no rule has to know. Running statistics and counters are averaged as ever.
    There is no bias correction, as in the paper; its pseudocode has equal weights, here they are the rule's.

    State: ``inner/...``, the rule's own; ``m/name`` and ``v/name``, the moments of what has been stepped so far.
    """

    server: Server = Server()

    def validate(self, clients: Sequence[Client]) -> None:
        super().validate(clients)
        if not self.inner.plain_mean:
            raise FedError(
                f"server.step={self.server.step}: {described(self.inner)} is no entrywise mean of what returns, "
                "so moments of it have no meaning. Take a rule that is one, such as fedit, ffa_lora or fedavg."
            )

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return under("inner", self.inner.init(model, clients))

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return self.inner.download(within("inner", state), client, rnd)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        before, p = within("inner", state), self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        sent = leaves(self.inner.expected(replies[0]))
        returned = [leaves(reply.returned) for reply in replies]
        moments = {key: value for key, value in state.items() if key.startswith(("m/", "v/"))}
        stepped: dict[str, Tensor] = {}
        for name, x in sent.items():
            ys = [flat[name] for flat in returned]
            if is_statistic(name, x):
                stepped[name] = mean(ys, weights) if x.is_floating_point() else ys[0]
                continue
            delta = mean([y - x for y in ys], weights)
            moments |= under_leaf(name, STEPS[self.server.step](self.server, delta, state, name))
            stepped[name] = x + self._move(delta, moments, name)
        back = joined(replies[0].returned, stepped)
        after = self.inner.aggregate(before, [replace(reply, returned=back) for reply in replies], rnd)
        return under("inner", after) | moments

    def served(self, state: Tensors) -> Tensors:
        return self.inner.served(within("inner", state))

    def shares(self, state: Tensors, replies: Sequence[Reply]) -> dict[str, float]:
        return self.inner.shares(within("inner", state), replies)

    def truncated(self, state: Tensors, client: Client) -> float:
        return self.inner.truncated(within("inner", state), client)

    def _move(self, delta: Tensor, moments: Tensors, name: str) -> Tensor:
        m, v = moments.get(f"m/{name}", delta), moments.get(f"v/{name}")
        return self.server.eta * (m if v is None else m / (v.sqrt() + self.server.tau))


def under_leaf(name: str, moments: Moments) -> dict[str, Tensor]:
    return {f"{kind}/{name}": value for kind, value in moments.items()}


def _avgm(server: Server, delta: Tensor, state: Tensors, name: str) -> Moments:
    return {"m": server.beta * state.get(f"m/{name}", torch.zeros_like(delta)) + delta}


def _adagrad(server: Server, delta: Tensor, state: Tensors, name: str) -> Moments:
    return {"v": state.get(f"v/{name}", torch.full_like(delta, server.tau**2)) + delta.square()}


def _adam(server: Server, delta: Tensor, state: Tensors, name: str) -> Moments:
    v = state.get(f"v/{name}", torch.full_like(delta, server.tau**2))
    return {**_first(server, delta, state, name), "v": server.beta2 * v + (1 - server.beta2) * delta.square()}


def _yogi(server: Server, delta: Tensor, state: Tensors, name: str) -> Moments:
    v, square = state.get(f"v/{name}", torch.full_like(delta, server.tau**2)), delta.square()
    return {**_first(server, delta, state, name), "v": v - (1 - server.beta2) * square * (v - square).sign()}


def _first(server: Server, delta: Tensor, state: Tensors, name: str) -> Moments:
    return {"m": server.beta * state.get(f"m/{name}", torch.zeros_like(delta)) + (1 - server.beta) * delta}


STEPS: dict[str, Callable[[Server, Tensor, Tensors, str], Moments]] = {
    "avgm": _avgm,
    "adagrad": _adagrad,
    "adam": _adam,
    "yogi": _yogi,
}
"""The moments after a round, from ``Delta`` and those before it."""
