"""FlexLoRA (Bai et al., 2024): the products are averaged, and every client gets the best approximation of its rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors, names_of, within
from fedllm.lowrank import LowRank, Settled, fill, settle
from fedllm.mean import mean_products


@dataclass(frozen=True)
class FlexLoRA(Algorithm):
    """``W = sum p_i B_i A_i`` with ``p_i = n_i / n``; client i is sent ``W^(r_i)``.

    What truncation cut off for a client is missing from what it returns, so ``W`` loses it, round after round.

    State: ``W/name``, the served update; ``top/name``, its best approximation of rank ``r_max``; ``error/name``,
    ``|| W - W^(r) ||_F`` for ``r = 0 ... r_max``; and ``r_max`` itself, the largest rank of all clients.
    """

    any_rank: ClassVar[bool] = True
    summed: ClassVar[bool] = True

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        r_max = max(client.rank for client in clients)
        state: dict[str, Tensor | LowRank] = {"r_max": torch.tensor(r_max)}
        for name, weight in model.weights.items():
            state |= kept(name, settle(model.update.get(name, LowRank.zeros(*weight.shape)), r_max), r_max)
        return state

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return {
            name: fill(top.leading(client.rank), client.rank, rnd.rng("fresh", name))
            for name, top in within("top", state).items()
        }

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        after, r_max = {"r_max": state["r_max"]}, int(state["r_max"])
        for name in names_of(replies):
            W = self.averaged([reply.returned[name] for reply in replies], weights, state[f"top/{name}"])
            after |= kept(name, settle(W, r_max, state[f"top/{name}"]), r_max)
        return after

    def averaged(self, updates: Sequence[LowRank], weights: Sequence[float], top: LowRank) -> LowRank:
        """The next W of one module, of which ``top`` was the best approximation of rank ``r_max``."""
        return mean_products(updates, weights)

    def served(self, state: Tensors) -> Tensors:
        return within("W", state)

    def truncated(self, state: Tensors, client: Client) -> float:
        return (
            float(sum(errors[min(client.rank, len(errors) - 1)] ** 2 for errors in within("error", state).values()))
            ** 0.5
        )


def kept(name: str, found: Settled, r_max: int) -> dict[str, LowRank | Tensor]:
    """The part of the state that serves this update."""
    return {f"W/{name}": found.W, f"top/{name}": found.top, f"error/{name}": found.tails(r_max)}
