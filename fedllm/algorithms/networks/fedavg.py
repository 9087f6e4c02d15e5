"""FedAvg (McMahan et al., 2017): every client trains the whole network, the server averages it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors, names_of
from fedllm.mean import mean_values


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """``x = sum p_i x_i`` for every weight; counters of norms are taken from the first reply.

    Args:
        weighting: ``data``, ``p_i = n_i / n`` over the cohort, or ``uniform``.
    """

    plain_mean: ClassVar[bool] = True

    weighting: Literal["data", "uniform"] = "data"

    network: ClassVar[str] = "plain"

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return {**model.weights, **model.update}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return state

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        return self.averaged(state, replies)

    def averaged(self, state: Tensors, replies: Sequence[Reply]) -> dict:
        """The mean of every name that came back."""
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        return {name: mean_values([reply.returned[name] for reply in replies], weights) for name in names_of(replies)}

    def shares(self, state: Tensors, replies: Sequence[Reply]) -> dict[str, float]:
        if self.weighting == "uniform":
            return {reply.client.id: 1 / len(replies) for reply in replies}
        return super().shares(state, replies)
