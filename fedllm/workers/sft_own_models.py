"""Clients that keep their adapters to themselves, each on a base model of its own where ``model.own`` deals them out.

They answer in the tokens of one vocabulary, so what rules on private networks share (``fd``) they can share too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedllm.core import Client, Model, Round, Tensors
from fedllm.lowrank import LowRank
from fedllm.models import language
from fedllm.workers.scoring import Score, device, measured
from fedllm.workers.settings import Loss
from fedllm.workers.sft import SFTWorker


@dataclass(frozen=True)
class Seat:
    """The worker, standing for one client."""

    worker: OwnWorker
    client: Client

    @property
    def steps(self) -> int:
        """Optimizer steps in a round."""
        federation = self.worker.federation
        return federation.settings.steps_for(len(federation.rows[self.client.id]))

    @property
    def model(self) -> Model:
        """The client's adapter before it trains, drawn from the run's seed at no cost in bytes."""
        return self.worker.federation.own(self.client)

    def train(
        self, sent: Tensors, memory: Tensors, rnd: Round, *, loss: Loss = cross_entropy
    ) -> tuple[dict[str, LowRank], dict[str, Tensor], dict[str, float]]:
        """Trains the adapter ``sent`` on this client's rows and base model.

        Args:
            memory: not used; it is returned.
            loss: of the completions' logits ``(N, V)``, V the common vocabulary, and their tokens ``(N,)``. Some models
                have columns beyond it, which are no tokens.
        """
        V = self.worker.federation.classes
        seat = self.worker.sft(self.client).of(self.client)
        trained, _, metrics = seat.train(sent, {}, rnd, loss=lambda z, y: loss(z[:, :V], y))
        return trained, dict(memory), metrics

    def score(self, adapter: Tensors) -> dict[str, float]:
        """The scores of this client's base model with ``adapter`` on the held-out rows."""
        return self.worker.score(self.client, adapter).metrics


class OwnWorker:
    """A base model and a trainer of each kind that clients of this process have, made when the first of them trains.

    Args:
        federation: a ``TextFederation``, what is known before a weight is loaded.
        on_step: called with the loss after every optimizer step.
    """

    def __init__(self, federation: Any, on_step: Callable[[float | None], None]) -> None:
        self.federation, self.on_step = federation, on_step
        self._made: dict[str, SFTWorker] = {}

    def of(self, client: Client) -> Seat:
        """This worker, standing for ``client``."""
        return Seat(self, client)

    def sft(self, client: Client) -> SFTWorker:
        """What trains the clients that have this client's base model."""
        if client.level not in self._made:
            federation, recipe = self.federation, self.federation.recipe
            rows = {c.id: federation.rows[c.id] for c in federation.clients if c.level == client.level}
            base = language.load(recipe.model.of(client), device(), recipe.run.seed)
            self._made[client.level] = SFTWorker(
                federation.settings, base, federation.tokenizer, rows, recipe.run.rounds, self.on_step
            )
        return self._made[client.level]

    def score(self, client: Client, adapter: Tensors) -> Score:
        """Of the client's base model with ``adapter``."""
        with self.sft(client).serving(adapter) as model:
            return measured(model, self.federation)

    def evaluate(self, update: Tensors) -> Score:
        """Of the untouched base models, the mean over clients; what clients share is no model and has no score."""
        if update:
            return Score({}, [])
        clients = self.federation.clients
        each = {level: self.score(client, {}) for level, client in {c.level: c for c in clients}.items()}
        keys = each[clients[0].level].metrics
        mean = {f"own_{key}": sum(each[c.level].metrics[key] for c in clients) / len(clients) for key in keys}
        return Score(mean, [line for score in each.values() for line in score.generations])
