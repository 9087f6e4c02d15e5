"""Clients that keep their adapters to themselves, each on a base model of its own where ``model.own`` deals them out.

They answer in the tokens of one vocabulary, so what rules on private networks share (``fd``) they can share too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn.functional import cross_entropy

from fedllm.core import Client, ClientWorker, LocalResult, LocalTraining, Model, Score, Tensors
from fedllm.models import language
from fedllm.workers.scoring import device, measured
from fedllm.workers.sft import SFTWorker


@dataclass(frozen=True)
class OwnModelClient(ClientWorker):
    """One client's view of the worker."""

    worker: OwnWorker
    client: Client

    @property
    def steps(self) -> int:
        federation = self.worker.federation
        return federation.settings.steps_for(len(federation.rows[self.client.id]))

    @property
    def model(self) -> Model:
        """The client's adapter before it trains, drawn from the run's seed at no cost in bytes."""
        return self.worker.federation.own(self.client)

    def fit(self, request: LocalTraining) -> LocalResult:
        """Trains the client's adapter on its rows and base model; the memory is not used, and returned.

        The loss is of the common vocabulary's V columns; some models have columns beyond it, which are no tokens.
        """
        request.only("worker.name=sft with models of the clients' own", "loss")
        V, loss = self.worker.federation.classes, request.loss or cross_entropy
        base = self.worker.sft(self.client).of(self.client)
        trained, _, metrics = base.train(request.weights, {}, request.rnd, loss=lambda z, y: loss(z[:, :V], y))
        return LocalResult(trained, dict(request.memory), metrics)

    def score(
        self, weights: Tensors, alphas: Mapping[str, float] | None = None, forward: Callable[..., object] | None = None
    ) -> dict[str, float]:
        """The scores of this client's base model with the adapter ``weights`` on the held-out rows."""
        return self.worker.score(self.client, weights).metrics


class OwnWorker:
    """A base model and a trainer of each kind that clients of this process have, made when the first of them trains.

    Args:
        federation: a ``TextFederation``, what is known before a weight is loaded.
        on_step: called with the loss after every optimizer step.
    """

    def __init__(self, federation: Any, on_step: Callable[[float | None], None]) -> None:
        self.federation, self.on_step = federation, on_step
        self._made: dict[str, SFTWorker] = {}

    def of(self, client: Client) -> OwnModelClient:
        """This worker, standing for ``client``."""
        return OwnModelClient(self, client)

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
