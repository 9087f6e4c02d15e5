"""ProgFed (Wang et al., 2022): the network grows stage by stage, each time with a fresh head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.config.types import Count
from fedllm.core import Client, Model, Reply, Round, Tensors, under, within
from fedllm.errors import FedError
from fedllm.models import submodel
from fedllm.models.resnet import stage_rounds


@dataclass(frozen=True)
class ProgFed(FedAvg):
    """Stage s of S trains the first s parts of the network and a linear head on them, as FedAvg does.

    ``T / (2 S)`` rounds for every stage but the last, which gets the rest. There is no warm-up of new parts.

    Args:
        stages: S; 1 is FedAvg.
    """

    stages: Count = 4

    network: ClassVar[str] = "growing"

    def phases(self, rounds: int) -> tuple[int, ...]:
        return stage_rounds(rounds, self.stages)

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        most = len(model.anatomy.blocks) - 1
        if not 1 <= self.stages <= most:
            raise FedError(f"algorithm.stages={self.stages}: this network grows in 1 to {most} stages.")
        return {
            "anatomy": submodel.written(model.anatomy),
            "depth": torch.tensor(most - self.stages + 1),
            **under("weights", {**model.weights, **model.update}),
        }

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return _grown(state, self._depth(state, rnd))

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        depth = torch.tensor(self._depth(state, rnd))
        return {**state, "depth": depth, **under("weights", self.averaged(state, replies))}

    def served(self, state: Tensors) -> Tensors:
        """The network as far as it has grown."""
        return _grown(state, int(state["depth"]))

    def _depth(self, state: Tensors, rnd: Round) -> int:
        ends = accumulate(self.phases(max(rnd.rounds, rnd.index)))
        stage = next(s for s, end in enumerate(ends, start=1) if rnd.index <= end)
        return len(submodel.read(state["anatomy"]).blocks) - 1 - self.stages + stage


def _grown(state: Tensors, depth: int) -> Tensors:
    anatomy = submodel.read(state["anatomy"])
    held = submodel.at_depth(anatomy, within("weights", state), depth)
    others = tuple(f"{head}." for head in anatomy.heads if head != anatomy.heads[depth - 1])
    return {name: tensor for name, tensor in held.items() if not name.startswith(others)}
