"""Federations whose clients are on other machines: the server's view of them, and a node's view of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedllm.core import Client, ClientWorker, LocalResult, LocalTraining, Model, Score, Tensors
from fedllm.errors import FedError
from fedllm.federation.text import TextFederation, TextWorker
from fedllm.models import language
from fedllm.privacy.cohorts import size
from fedllm.recipe.sections import Recipe
from fedllm.workers.lora import target_shapes
from fedllm.workers.scoring import device


class DeclaredFederation(TextFederation):
    """The server's view: clients as they declared themselves, and the server's own held-out rows.

    Args:
        recipe: whose worker trains adapters of language models.
        clients: in a fixed order.
        steps: optimizer steps a round of each, by id.

    Raises:
        FedError: clients that do not fit the rule or the model, or no held-out rows.
    """

    def __init__(self, recipe: Recipe, clients: Sequence[Client], steps: Mapping[str, int]) -> None:
        self.recipe, self.settings, self.guessed = recipe, recipe.worker, False
        self.clients, self.steps = tuple(clients), steps
        recipe.algorithm.validate(self.clients)
        skeleton = language.skeleton(recipe.model)
        self.skeletons = {client.level: skeleton for client in self.clients}
        self.shapes = {level: target_shapes(net, self.settings.targets) for level, net in self.skeletons.items()}
        self._check_ranks(self.clients)
        self.tokenizer = language.common_tokenizer(recipe.model)
        self.classes = 1 + max(self.tokenizer.get_vocab().values())
        self.test = self._rows("test", recipe.data.test_rows)
        self.scored = [row for row in self._encode(self.test) if row.trained]
        if not self.scored:
            raise FedError("none of the server's held-out rows has a completion that survives worker.max_length.")
        self._check_positions(self.scored)
        self.rows = {client.id: self.scored[:1] for client in self.clients}  # the trainer wants to see one row
        self.partition = {
            "kind": "declared",
            "seed": recipe.run.seed,
            "undealt_rows": 0,
            "dropped_rows": 0,
            "cut_rows": 0,
            "clients": {c.id: {"rows": c.num_samples, "rank": c.rank, "labels": {}} for c in self.clients},
        }
        shared = self.shapes[self.clients[0].level]
        weights = {name: torch.empty(shape, device="meta") for name, shape in shared.items()}
        self.model = Model(weights, classes=self.classes)
        recipe.robust.check(
            recipe.algorithm, self.model, self.clients, size(self.clients, recipe.clients.participation)
        )

    def worker(self, on_step: Callable[[float | None], None]) -> DeclaredWorker:  # type: ignore[override]
        """Loads the model, to score the served update."""
        base = language.load(self.recipe.model, device(), self.recipe.run.seed)
        return DeclaredWorker(self, TextWorker(self, base, on_step))


@dataclass(frozen=True)
class DeclaredWorker:
    """Scores on the server; who trains is elsewhere."""

    federation: DeclaredFederation
    text: TextWorker

    def of(self, client: Client) -> DeclaredClient:
        return DeclaredClient(client, self.federation.steps[client.id])

    def evaluate(self, update: Tensors) -> Score:
        return self.text.evaluate(update)


class DeclaredClient(ClientWorker):
    """A client of which the server knows what it declared."""

    def __init__(self, client: Client, steps: int) -> None:
        self.client, self._steps = client, steps

    @property
    def steps(self) -> int:
        return self._steps

    def fit(self, request: LocalTraining) -> LocalResult:
        raise FedError(f"client {self.client.id} trains on its own machine.")


class OwnRows(TextFederation):
    """A node's view: one client, which has its owner's id and all the training rows there are.

    Args:
        recipe: of one client.
        id: the client's; its random draws follow it.
    """

    def __init__(self, recipe: Recipe, id: str) -> None:
        super().__init__(recipe)
        if len(self.clients) != 1:
            raise FedError(f"a node is one client, and its recipe makes {len(self.clients)} of its rows.")
        (client,) = self.clients
        self.clients = (dataclasses.replace(client, id=id),)
        self.rows = {id: self.rows[client.id]}
