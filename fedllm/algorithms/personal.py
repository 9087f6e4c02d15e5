"""Steps that rules with personal models share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core import ClientWorker, LocalResult, Model, Penalty, Phase, Round, Tensors

COSTS = ("steps", "tokens", "seconds", "flops")
"""Metrics of a client's training that add up where it trains more than once in a round."""


def own(worker: ClientWorker, memory: Tensors) -> Tensors:
    """``omega_k``: what the client remembers, or at its first round what it draws from the run's seed."""
    return memory or worker.model.weights


def scored(worker: ClientWorker, omega: Tensors, metrics: Mapping[str, float]) -> dict[str, float]:
    """With the scores of the client's own network on its own test examples."""
    return {**metrics, **{f"own_{key}": value for key, value in worker.score(omega).items()}}


def both(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The shared phase's metrics; what both have spent; and the personal phase's loss."""
    spent = {key: value + first.get(key, 0) for key, value in second.items() if key in COSTS}
    return {**second, **spent, **({"personal_loss": first["train_loss"]} if "train_loss" in first else {})}


def shared_part(model: Model, last: int) -> dict[str, Any]:
    """The weights of the numbered layers up to ``last``, and of what stands before the next one."""
    number = model.anatomy.numbers(model.weights)
    return {name: W for name, W in {**model.weights, **model.update}.items() if number[name] <= last}


def personal_step(
    worker: ClientWorker,
    sent: Tensors,
    private: Tensors,
    rnd: Round,
    alphas: Mapping[str, float] | None = None,
    phases: Sequence[Phase] = (),
    penalty: Penalty | None = None,
) -> LocalResult:
    """Trains both groups as one network: the shared one returns, the private one is remembered, both are scored."""
    trained, _, metrics = worker.train(
        {**private, **sent}, {}, rnd, alphas=alphas or {}, phases=phases, penalty=penalty
    )
    scores = {f"own_{key}": value for key, value in worker.score(trained, alphas).items()}
    shared = {name: trained[name] for name in sent}
    return LocalResult(shared, {name: trained[name] for name in private}, {**metrics, **scores})


def head(model: Model) -> dict[str, Any]:
    """The last linear layer: a matrix ``(classes, d)`` and its bias."""
    last = model.anatomy.layers[-1]
    return {name: W for name, W in {**model.weights, **model.update}.items() if name.startswith(f"{last}.")}


def head_shape(model: Model) -> tuple[int, int]:
    """Classes, and the length ``d`` of the representation that the last layer reads."""
    classes, d = next(W.shape for W in head(model).values() if W.ndim == 2)
    return classes, d
