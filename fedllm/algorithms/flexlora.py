"""FlexLoRA (Bai et al., 2024): the products are averaged, and every client gets the best approximation of its rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors, names_of, within
from fedllm.lowrank import LowRank, fill, settle, tail
from fedllm.mean import mean_products


@dataclass(frozen=True)
class FlexLoRA(Algorithm):
    """``W = sum p_i B_i A_i`` with ``p_i = n_i / n``; client i is sent ``W^(r_i)``.

    What truncation cut off for a client is missing from what it returns, so ``W`` loses it, round after round.

    State: ``W/name``, the served update; ``top/name``, its best approximation of rank ``r_max``; ``r_max``, the largest
    rank of all clients.
    """

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        served = {name: model.update.get(name, LowRank.zeros(*W.shape)) for name, W in model.weights.items()}
        return settled(served, {"r_max": torch.tensor(max(client.rank for client in clients))})

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return {
            name: fill(top.leading(client.rank), client.rank, rnd.rng("fresh", name))
            for name, top in within("top", state).items()
        }

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        return settled({n: mean_products([r.returned[n] for r in replies], weights) for n in names_of(replies)}, state)

    def served(self, state: Tensors) -> Tensors:
        return within("W", state)

    def truncated(self, state: Tensors, client: Client) -> float:
        return sum(error**2 for error in truncation_errors(state, client.rank).values()) ** 0.5


def settled(served: Mapping[str, LowRank | Tensor], state: Tensors) -> Tensors:
    """The state that serves these updates: each in its cheapest storage, with the directions that downloads take."""
    after: dict[str, LowRank | Tensor] = {"r_max": state["r_max"]}
    for name, W in served.items():
        after[f"W/{name}"], after[f"top/{name}"] = settle(W, int(state["r_max"]), state.get(f"top/{name}"))
    return after


def truncation_errors(state: Tensors, r: int) -> dict[str, float]:
    """``|| W - W^(r) ||_F`` of every weight."""
    return {name: tail(W, state[f"top/{name}"], r) for name, W in within("W", state).items()}
