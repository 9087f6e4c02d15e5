"""FedProx (Li et al., MLSys 2020) and SCAFFOLD (Karimireddy et al., ICML 2020): other steps of the clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedllm.algorithms.compositions.leaves import is_statistic, joined, leaves
from fedllm.config.types import NonNegative
from fedllm.core import (
    Algorithm,
    Around,
    Client,
    ClientWorker,
    LocalResult,
    LocalTraining,
    Model,
    Reply,
    Round,
    Tensors,
    described,
    under,
    within,
)
from fedllm.errors import FedError


@dataclass(frozen=True)
class LocalStep:
    """What is added to the steps that clients take, whatever the rule.

    Args:
        name: ``plain`` adds nothing; ``prox`` and ``scaffold``.
        mu: of ``prox``: ``mu / 2 |theta - theta_start|^2`` joins the loss. OpenFedLLM's 0.01; 0 is the rule.
    """

    name: Literal["plain", "prox", "scaffold"] = "plain"
    mu: NonNegative = 0.01

    def around(self, rule: Algorithm) -> Algorithm:
        """The rule with these steps."""
        if self.name == "prox":
            return Prox(rule, self.mu)
        return Scaffold(rule) if self.name == "scaffold" else rule


@dataclass(frozen=True)
class Prox(Around):
    """The loss gains ``mu / 2 |theta - theta_start|^2`` over all that trains; the server does what the rule does.

    Of products theta are PEFT's factors, B before LoRA's scale: alpha matters here, and nowhere else.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("plain_mean", "summed"):  # the server does what it would do
            object.__setattr__(self, name, getattr(self.inner, name))

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        return self.inner.local(Asked(worker, lambda asked: replace(asked, proximal=self.mu)), sent, memory, rnd)


@dataclass(frozen=True)
class Scaffold(Around):
    """Every step is corrected by ``c - c_i``, the control variates of the server and of client i, both zero at first.

    ``theta <- theta - eta (c - c_i)`` after each of K optimizer steps. Then ``c_i' = c_i - c + (x - y_i) / (K eta)``
    with x what was sent and ``y_i`` what returns (option II), and on the server ``c <- c + (1 / N) sum (c_i' - c_i)``
    over the cohort, N all clients. For SGD this is the paper's step. With AdamW the correction stays outside of the
    optimizer, as in OpenFedLLM: inside, a control variate would be normalised away.

    State: ``inner/...``, ``scaffold/leaf`` and ``clients``, N. A client that lost its memory starts from ``c_i = 0``.
    """

    def validate(self, clients: Sequence[Client]) -> None:
        super().validate(clients)
        if not self.inner.plain_mean:
            raise FedError(
                f"local.name=scaffold: {described(self.inner)} is no entrywise mean of what was sent, so control "
                "variates have no coordinates in it. Take a rule that is one, such as fedit, ffa_lora or fedavg."
            )

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return under("inner", self.inner.init(model, clients)) | {"clients": torch.tensor(len(clients))}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return {
            **self.inner.download(within("inner", state), client, rnd),
            **under("scaffold", within("scaffold", state)),
        }

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        c, own, asked = within("scaffold", sent), within("scaffold", memory), _without(sent)
        drift = _apart(c, own)
        returned, kept, metrics = self.inner.local(
            Asked(worker, lambda request: replace(request, drift=joined(request.weights, drift))),
            asked,
            within("inner", memory),
            rnd,
        )
        x, y = leaves(self.inner.expected(Reply(worker.client, asked, {}))), leaves(returned)
        moved = metrics["steps"] * worker.rate(rnd)
        change = {
            name: (x[name] - y[name]) / moved - c.get(name, torch.zeros(()))
            for name in x
            if moved and not is_statistic(name, x[name])
        }
        after = {**own, **{name: own.get(name, torch.zeros(())) + value for name, value in change.items()}}
        whole = {
            name: change.get(name, torch.zeros_like(value))
            for name, value in x.items()
            if not is_statistic(name, value)
        }
        return LocalResult(
            {**returned, **under("scaffold", whole)}, under("inner", kept) | under("scaffold", after), metrics
        )

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        after = self.inner.aggregate(within("inner", state), [_plain(reply) for reply in replies], rnd)
        c, N = within("scaffold", state), int(state["clients"])
        for reply in replies:
            for name, change in within("scaffold", reply.returned).items():
                c[name] = c.get(name, torch.zeros(())) + change / N
        return under("inner", after) | under("scaffold", c) | {"clients": state["clients"]}

    def served(self, state: Tensors) -> Tensors:
        return self.inner.served(within("inner", state))

    def truncated(self, state: Tensors, client: Client) -> float:
        return self.inner.truncated(within("inner", state), client)

    def shares(self, state: Tensors, replies: Sequence[Reply]) -> dict[str, float]:
        return self.inner.shares(within("inner", state), [_plain(reply) for reply in replies])

    def expected(self, reply: Reply) -> Tensors:
        inner = self.inner.expected(_plain(reply))
        zero = {name: torch.zeros_like(x) for name, x in leaves(inner).items() if not is_statistic(name, x)}
        return {**inner, **under("scaffold", zero)}

    def trained(self, reply: Reply) -> Tensors:
        return self.inner.trained(_plain(reply))

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return self.inner.personal(_plain(reply), within("inner", memory))


def _without(tensors: Tensors) -> dict[str, object]:
    return {name: value for name, value in tensors.items() if not name.startswith("scaffold/")}


def _plain(reply: Reply) -> Reply:
    return replace(reply, sent=_without(reply.sent), returned=_without(reply.returned))


def _apart(c: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``c - c_i``, either of which may lack what has not been trained yet."""
    zero = torch.zeros(())
    return {name: c.get(name, zero) - own.get(name, zero) for name in {**c, **own}}


class Asked(ClientWorker):
    """A worker that is asked for a little more than the rule asks for."""

    def __init__(self, inner: ClientWorker, more: Callable[[LocalTraining], LocalTraining]) -> None:
        self.inner, self.more, self.client = inner, more, inner.client

    @property
    def steps(self) -> int:
        return self.inner.steps

    @property
    def model(self) -> Model:
        return self.inner.model

    @property
    def shared(self) -> Model:
        return self.inner.shared

    @property
    def labels(self) -> Tensor:
        return self.inner.labels

    def rate(self, rnd: Round) -> float:
        return self.inner.rate(rnd)

    def fit(self, request: LocalTraining) -> LocalResult:
        return self.inner.fit(self.more(request))

    def score(
        self, weights: Tensors, alphas: Mapping[str, float] | None = None, forward: Callable[..., object] | None = None
    ) -> dict[str, float]:
        return self.inner.score(weights, alphas, forward)

    def outputs(
        self, weights: Tensors, forward: Callable[..., object] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return self.inner.outputs(weights, forward)
