"""FedHL (Peng et al., 2025): the full-rank W is the baseline of every update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedllm.algorithms.lora.flexlora import FlexLoRA, kept
from fedllm.config.types import Positive
from fedllm.core import Reply, Round, Tensors, within
from fedllm.errors import FedError
from fedllm.lowrank import absorb
from fedllm.mean import mean_products


@dataclass(frozen=True)
class FedHL(FlexLoRA):
    """``W_{t+1} = sum p_i(t) [W_t + (B_i A_i - W_t^(r_i))]``: what truncation cut off is never lost.

    The weights minimise the bound on the gradient's drift (Theorem 3, eq. 15): ``p*_i`` proportional to
    ``1 / (e_i^2 + epsilon)`` with ``e_i = || W_t - W_t^(r_i) ||_F``, then ``p_i = softmax(p*_i / temperature)``.

    Args:
        epsilon: keeps ``p*`` finite for a client that loses nothing.
        temperature: of the softmax (section VI.A: 1); ``null`` takes ``p*`` itself.
        truncation_error: ``norm``, as the bound that is minimised has it (eq. 21), or ``squared_norm``: eq. 8 put into
            eq. 15 to the letter, ``1 / (e_i^4 + epsilon)``.
        weights_per: one weight a client for the whole ``model``, or one for each ``module``.
        weights: ``fedhl``, or for the ablations of Table VIII ``fedavg`` (``n_i / n``) or ``rank`` (``r_i / sum r``).

    The weights sum to 1, so ``W_{t+1} = W_t + sum p_i (B_i A_i - W_t^(r_i))``; ``W_t^(r_i)`` lies in the spaces of
    ``W_t``, so a round adds at most ``sum r_i`` ranks.
    """

    epsilon: Positive = 1e-6
    temperature: Positive | None = 1.0
    truncation_error: Literal["norm", "squared_norm"] = "norm"
    weights_per: Literal["model", "module"] = "model"
    weights: Literal["fedhl", "fedavg", "rank"] = "fedhl"

    summed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise FedError(f"epsilon={self.epsilon}: give a finite number above 0.")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise FedError(f"temperature={self.temperature}: give a finite number above 0, or null.")

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        after, r_max = {"r_max": state["r_max"]}, int(state["r_max"])
        for (name, W), p in zip(self.served(state).items(), self._per_module(state, replies).tolist(), strict=True):
            returned, sent = [r.returned[name] for r in replies], [r.sent[name] for r in replies]
            moved = mean_products([*returned, *sent], [*p, *(-weight for weight in p)])
            after |= kept(name, absorb(W, moved, r_max, state[f"top/{name}"]), r_max)
        return after

    def shares(self, state: Tensors, replies: Sequence[Reply]) -> dict[str, float]:
        """By client id; with ``weights_per: module``, the mean over the modules."""
        mean = self._per_module(state, replies).mean(dim=0)
        return {reply.client.id: float(p) for reply, p in zip(replies, mean, strict=True)}

    def _per_module(self, state: Tensors, replies: Sequence[Reply]) -> torch.Tensor:
        """``p``: (modules, clients), rows sum to 1; rows are equal unless ``weights_per: module``."""
        if self.weights == "fedavg":
            p = torch.tensor([float(reply.client.num_samples) for reply in replies], dtype=torch.float64)
        elif self.weights == "rank":
            p = torch.tensor([float(reply.client.rank) for reply in replies], dtype=torch.float64)
        else:
            p = self._optimal(state, replies)
        return (p / p.sum(dim=-1, keepdim=True)).expand(len(self.served(state)), len(replies))

    def _optimal(self, state: Tensors, replies: Sequence[Reply]) -> torch.Tensor:
        e = [
            [errors[min(reply.sent[name].rank, len(errors) - 1)] for reply in replies]  # of the rank that it was sent
            for name, errors in within("error", state).items()
        ]
        e2 = torch.tensor(e, dtype=torch.float64).square()
        if self.weights_per == "model":
            e2 = e2.sum(dim=0, keepdim=True)
        drift = e2 if self.truncation_error == "norm" else e2.square()
        p = (drift.min(dim=-1, keepdim=True).values + self.epsilon) / (drift + self.epsilon)
        p = p / p.sum(dim=-1, keepdim=True)
        return p if self.temperature is None else torch.softmax(p / self.temperature, dim=-1)
