"""FedDropout (Caldas, 2018), HeteroFL (Diao, 2021), FedRolex (Alam, 2022): clients train parts cut from the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within
from fedllm.models import submodel
from fedllm.models.submodel import Channels, Index
from fedllm.structure import Anatomy


@dataclass(frozen=True)
class SubModel(FedAvg):
    """Per scalar the mean over the clients that held it; one that nobody held keeps its value.

    It is the *whole* network that is served: where nobody trains the outer channels, they answer as they were drawn.

    Args:
        preset: ``fedlmt_paper``, the cut alone; ``heterofl_paper``, also HeteroFL's scaler (activations divided by the
            width in training) and mask (logits of classes that a client lacks are 0 in its loss, and the head's rows of
            these do not enter the mean). Its static norms are ``worker.statistics=static``.
        weighting: ``uniform``, or ``data``.
    """

    preset: Literal["fedlmt_paper", "heterofl_paper"] = "fedlmt_paper"
    weighting: Literal["data", "uniform"] = "uniform"

    def channels(self, anatomy: Anatomy, client: Client, rnd: Round) -> Channels:
        """The channels of every group that the client trains in this round."""
        raise NotImplementedError

    def cut(self, model: Model) -> Anatomy:
        """Which axes lose the same channels."""
        return model.anatomy

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return {"anatomy": submodel.written(self.cut(model)), **under("weights", {**model.weights, **model.update})}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return submodel.take(within("weights", state), self._index(state, client, rnd))

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        if self.preset == "fedlmt_paper":
            return worker.train(sent, memory, rnd)
        classes = worker.labels
        returned, memory, metrics = worker.train(
            sent, memory, rnd, scale=worker.client.width, loss=lambda z, y: masked_loss(z, y, classes)
        )
        head = worker.model.anatomy.layers[-1]
        for name in [name for name in sent if name.startswith(f"{head}.")]:
            returned = {**returned, name: sent[name].index_copy(0, classes, returned[name][classes])}
        return LocalResult(returned, memory, metrics)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        held = [self._held(state, reply, rnd) for reply in replies]
        parts, where = [part for part, _ in held], [at for _, at in held]
        after = submodel.scatter_mean(within("weights", state), parts, where, [p[reply.client.id] for reply in replies])
        return {"anatomy": state["anatomy"], **under("weights", after)}

    def served(self, state: Tensors) -> Tensors:
        return within("weights", state)

    def _index(self, state: Tensors, client: Client, rnd: Round) -> Index:
        anatomy = submodel.read(state["anatomy"])
        return submodel.index(anatomy, self.channels(anatomy, client, rnd))

    def _held(self, state: Tensors, reply: Reply, rnd: Round) -> tuple[dict[str, Tensor], Index]:
        """What counts of a reply, and where: with the mask, not the head's rows that came back as they were sent."""
        part, at = dict(reply.returned), self._index(state, reply.client, rnd)
        if self.preset == "fedlmt_paper":
            return part, at
        head = submodel.read(state["anatomy"]).layers[-1]
        names = [name for name in part if name.startswith(f"{head}.")]
        moved = torch.stack(
            [
                (part[name] != reply.sent[name])
                .flatten(1 if part[name].ndim > 1 else 0)
                .reshape(len(part[name]), -1)
                .any(1)
                for name in names
            ]
        )
        return submodel.rows(part, at, names, moved.any(0).nonzero().flatten())


def masked_loss(z: Tensor, y: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy with the logits of all other classes set to 0, not minus infinity; ``z (..., C)``, ``y (...)``."""
    mine = torch.zeros(z.shape[-1], dtype=torch.bool, device=z.device).index_fill(0, classes.to(z.device), True)
    return torch.nn.functional.cross_entropy(torch.where(mine, z, 0.0).flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class HeteroFL(SubModel):
    """A client of width s trains the first ``ceil(s c)`` channels of every layer, always the same."""

    def channels(self, anatomy: Anatomy, client: Client, rnd: Round) -> Channels:
        return submodel.prefix(anatomy, client.width)


@dataclass(frozen=True)
class FedRolex(SubModel):
    """The window of ``ceil(s c)`` channels moves on by one every round, so that all are trained in turn."""

    def channels(self, anatomy: Anatomy, client: Client, rnd: Round) -> Channels:
        return submodel.rolling(anatomy, client.width, rnd.index - 1)


@dataclass(frozen=True)
class FedDropout(SubModel):
    """A random ``ceil(s c)`` channels for every client and round.

    Args:
        residuals: ``consistent``, the branches of an identity shortcut lose the same channels; ``legacy``, as in the
            published runs every convolution draws its own order, so that not even width 1 preserves the function.
    """

    own_entries: ClassVar[str] = "every client trains channels that are drawn for it alone"

    residuals: Literal["consistent", "legacy"] = "consistent"

    def cut(self, model: Model) -> Anatomy:
        return model.anatomy if self.residuals == "consistent" else model.make().legacy_anatomy()

    def channels(self, anatomy: Anatomy, client: Client, rnd: Round) -> Channels:
        draw = submodel.random if self.residuals == "consistent" else submodel.permuted
        return draw(anatomy, client.width, rnd.rng("channels", client.id))
