"""The way in from Python: a run of a recipe with its results, and a federation of a torch model of your own."""

from __future__ import annotations

import copy
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from fedllm.algorithms import LOW_RANK
from fedllm.core import Algorithm, Client, ClientWorker, LocalResult, LocalTraining, Model, Round, Score, Tensors
from fedllm.errors import FedError
from fedllm.fleets.local import Local
from fedllm.fleets.processes import joined
from fedllm.models.libraries import quiet_libraries
from fedllm.progress import Silent
from fedllm.recipe.page import Recipe, load
from fedllm.rounds import federate
from fedllm.train import train as train_recipe

LocalStep = Callable[[nn.Module, Client, Round], Mapping[str, float]]
"""Trains the model in place on the client's data and returns metrics such as ``train_loss``."""


@dataclass(frozen=True)
class RunResult:
    """A finished run, read from its folder.

    Args:
        folder: the run's folder.
        exported: the name of what it ends in, ``adapter`` or ``model``.
    """

    folder: Path
    exported: str = "adapter"

    @property
    def adapter(self) -> Path:
        """The folder of the exported adapter, or of the exported network."""
        return self.folder / self.exported

    @property
    def rounds(self) -> pd.DataFrame:
        """A row for each round: loss, bytes, seconds, and each score as ``eval.NAME``."""
        plain = ("round", "train_loss", "bytes_down", "bytes_up", "flops", "seconds")
        rows = [
            {key: record.get(key) for key in plain} | {f"eval.{k}": v for k, v in record["eval"].items()}
            for record in self._records()
        ]
        return pd.DataFrame(rows).set_index("round")

    @property
    def clients(self) -> pd.DataFrame:
        """A row for each client in each round whose update was averaged."""
        rows = [
            {"round": record["round"], "client": id, "weight": record["weights"].get(id)} | client
            for record in self._records()
            for id, client in record["clients"].items()
        ]
        return pd.DataFrame(rows).set_index(["round", "client"])

    @property
    def scores(self) -> pd.DataFrame:
        """The summary's table: a row for each model that was scored."""
        summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        return pd.DataFrame(summary["rows"]).set_index("name")

    def plot(self) -> list[Path]:
        """The pictures that the run's report shows."""
        return sorted((self.folder / "plots").glob("*.png"))

    def _records(self) -> list[dict]:
        text = (self.folder / "rounds.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def _repr_html_(self) -> str:
        return f"<p><code>{html.escape(str(self.folder))}</code></p>{self.scores.to_html()}"


def load_recipe(recipe: str | Path, *overrides: str) -> Recipe:
    """The recipe of a name or a page's path, with ``a.b=c`` overrides, checked as the command checks it.

    Raises:
        FedError: an unknown recipe, key or name, or a value of the wrong type.
    """
    return load([f"recipe={recipe}", *overrides])


def run(recipe: str | Path | Recipe, *overrides: str) -> RunResult:
    """Runs a recipe in this process and returns its results; the same as ``fedllm train``.

    Raises:
        FedError: something that the caller can mend, in one sentence.
    """
    if isinstance(recipe, Recipe) and overrides:
        raise FedError(f"{overrides[0]}: a loaded recipe takes no overrides, give them to load_recipe.")
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, *overrides)
    if loaded.run.plan:
        raise FedError("run.plan=true has no results: take the command, fedllm train ... run.plan=true.")
    quiet_libraries()
    with joined() as processes:
        train_recipe(loaded, processes)
    return RunResult(loaded.output, loaded.worker.exported)


@dataclass(frozen=True)
class Simulation:
    """What a simulated federation leaves behind.

    Args:
        rounds: a row for each round and client, with what the local step measured.
        state: the server's state after the last round.
        model: a copy of the model with the served weights.
    """

    rounds: pd.DataFrame
    state: Tensors
    model: nn.Module


def simulate(
    rule: Algorithm,
    clients: Sequence[Client] | Mapping[str, int],
    train: LocalStep,
    rounds: int,
    *,
    model: nn.Module,
    seed: int = 0,
    participation: float = 1.0,
) -> Simulation:
    """Runs a rule on whole weights over a torch model and a local step of your own, in this process.

    Args:
        rule: such as ``FedAvg()``, or a subclass of ``Algorithm`` of your own.
        clients: the participants, or their ids with their numbers of examples.
        train: trains the model in place on a client's data.
        rounds: how many.
        model: its weights are where the federation starts; it is not changed.
        seed: of the cohorts and of ``Round.rng``.
        participation: share of the clients in a round's cohort.

    Raises:
        FedError: the rule asks a client for more than a local step can do, or the clients do not fit it.
    """
    if isinstance(rule, tuple(LOW_RANK.values())):
        raise FedError(
            f"{type(rule).__name__} averages low-rank updates, and a local step trains whole weights: take a rule such "
            "as FedAvg, or run a recipe."
        )
    members = [Client(id, n) for id, n in clients.items()] if isinstance(clients, Mapping) else list(clients)
    rule.validate(members)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    worker = StepWorker(copy.deepcopy(model), train, weights)
    state, rows = rule.init(Model(weights), members), []
    outcomes = federate(
        rule, members, worker, Local(Silent(), tolerant=False), Silent(),
        state=state, memories={}, first=1, rounds=rounds, seed=seed, participation=participation,
    )  # fmt: skip
    for outcome in outcomes:
        state = outcome.state
        rows += [{"round": outcome.round.index, "client": r.client.id, **r.metrics} for r in outcome.replies]
    final = copy.deepcopy(model)
    final.load_state_dict(dict(rule.served(state)), strict=False)
    return Simulation(pd.DataFrame(rows), state, final)


@dataclass(frozen=True)
class StepWorker:
    """A worker whose clients train one torch model by the caller's local step."""

    module: nn.Module
    step: LocalStep
    weights: Tensors

    def of(self, client: Client) -> StepClient:
        """The view of one client."""
        return StepClient(self, client)

    def evaluate(self, update: Tensors) -> Score:
        """No scores: the caller has the model."""
        return Score({})


@dataclass(frozen=True)
class StepClient(ClientWorker):
    """One client, trained by the caller's local step."""

    worker: StepWorker
    client: Client

    @property
    def steps(self) -> int:
        return 1

    @property
    def model(self) -> Model:
        return Model(self.worker.weights)

    def fit(self, request: LocalTraining) -> LocalResult:
        request.only("a local step of your own", "frozen")
        net = self.worker.module
        given = {**request.frozen, **request.weights}
        if products := [name for name, value in given.items() if not isinstance(value, Tensor)]:
            raise FedError(f"{products[0]} is a low-rank update, and a local step trains whole weights.")
        net.load_state_dict({**self.worker.weights, **given})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.rnd.rng("local", self.client.id).initial_seed())
            metrics = dict(self.worker.step(net, self.client, request.rnd))
        trained = net.state_dict()
        returned = {name: trained[name].detach().clone() for name in request.weights}
        return LocalResult(returned, request.memory, metrics)
