"""From a recipe to a federation that trains whole networks on arrays: examples, clients, plan and worker."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fedllm.algorithms import PRIVATE
from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.core import Algorithm, Client, ClientWorker, LocalResult, LocalTraining, Model, Round, Tensors
from fedllm.data.partition import IID, Dirichlet, Partition, capped, describe, dirichlet_shares
from fedllm.errors import FedError, Unreachable
from fedllm.federation.budget import Level, assign, totals
from fedllm.lowrank import LowRank
from fedllm.models.build import drawn
from fedllm.models.flops import forward_cost, sizes
from fedllm.models.lowrank_conv import SHARED, freeze, plain, unfolded
from fedllm.models.network import Make, fitted
from fedllm.privacy.cohorts import size
from fedllm.privacy.cohorts import uniform as sample
from fedllm.storage import files, run_folder
from fedllm.wire import serialization as ledger
from fedllm.workers.settings import Vision
from fedllm.workers.vision import VisionWorker, output

LEVELS = {f"b{i}": (i / 4, i) for i in range(1, 5)}
"""Capacity level -> width and depth of the parts that fit it, as in FedLMT's Table 1; b4 holds the whole network."""


@dataclass
class DryRunClient(ClientWorker):
    """A client that returns what it is sent and notes what it would have trained: the plan needs no training."""

    federation: ArrayFederation
    client: Client
    trained: dict[str, Tensor] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.federation.settings.steps_for(len(self.federation.parts[self.client.id]))

    @property
    def model(self) -> Model:
        return self.federation.own.get(self.client.level, self.federation.model)

    @property
    def shared(self) -> Model:
        return self.federation.model

    @property
    def labels(self) -> Tensor:
        return self.federation.labels_of(self.client)

    def fit(self, request: LocalTraining) -> LocalResult:
        sent, nested = request.weights, request.nested
        products = {name: value for name, value in sent.items() if isinstance(value, LowRank)}
        whole = {name: value for name, value in sent.items() if name not in products}
        others = {name: value for name, value in request.frozen.items() if name not in (self.model.frozen or {})}
        beside = request.network is not None  # the papers count a client's own network, which it uses
        self.trained = dict(self.model.weights) if beside else plain(self.model, {**others, **whole})
        alpha = self.federation.settings.alpha
        self.trained |= unfolded(products, alpha) | unfolded(nested, alpha)
        self.alphas = {SHARED: alpha, **request.alphas}
        return LocalResult({**whole, **(nested or products)}, request.memory, {})

    def outputs(self, weights: Tensors, forward: Callable[..., Any] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Zeros, an example of each class."""
        net = self.model.make()
        x = torch.zeros(len(self.labels), *self.federation.task.shape, device="meta")
        yield torch.zeros((forward or output)(net, x).shape), self.labels


class ArrayFederation:
    """Everything about a run that is known before its examples are decoded.

    Args:
        recipe: the resolved recipe, whose worker is ``Vision``. Where it only asks for a plan and the data cannot be
            had, the known number of examples is dealt out evenly.

    Raises:
        FedError: examples that cannot be had, an unknown level, a network that lacks the algorithm's variant.
    """

    def __init__(self, recipe: Any) -> None:
        self.recipe, self.task = recipe, recipe.data.task
        self.settings: Vision = recipe.worker
        make = recipe.model.maker(recipe.algorithm.network, self.task.classes, self.task.shape[0])
        members = self._members()
        recipe.algorithm.validate(members)
        data, seed = recipe.data, recipe.run.seed
        labels, partition = self._labels("train", data.train_rows), data.partition
        if isinstance(labels, int) and partition.by_label:
            if not self.guessed:
                raise FedError(
                    f"data.partition.name={recipe.page['data']['partition']['name']} needs labels: take iid or blocks."
                )
            partition = IID()
        n = labels if isinstance(labels, int) else len(labels)
        known = None if isinstance(labels, int) else labels
        parts = partition.split(known, n, members, seed)
        self.clients = tuple(
            dataclasses.replace(member, num_samples=len(part)) for member, part in zip(members, parts, strict=True)
        )
        self.labels = known
        self.tested: int | None = None  # test examples, once they are loaded
        self.parts = {client.id: part for client, part in zip(self.clients, parts, strict=True)}
        kind = recipe.page["data"]["partition"]["name"]
        self.partition = describe(kind, parts, known, n, self.clients, seed)
        described = self._model(make, drawn_too=False)
        recipe.algorithm.init(described, self.clients)  # refuses constants that the network has no layers for
        recipe.robust.check(recipe.algorithm, described, self.clients, size(self.clients, recipe.clients.participation))
        drawn_too = not recipe.run.plan
        self.model = self._model(make, drawn_too=drawn_too)
        self.own = {
            name: self._model(
                dataclasses.replace(recipe.model, name=name).maker(
                    recipe.algorithm.network, self.task.classes, self.task.shape[0]
                ),
                drawn_too=drawn_too,
            )
            for name in dict.fromkeys(recipe.model.own)
        }

    def _model(self, make: Make, *, drawn_too: bool) -> Model:
        """The network with its first values, or its description alone, which a plan makes do with."""
        net, first = make(), Round(0, self.recipe.run.seed)
        draw = lambda described: drawn(described, first.rng("initial"))  # noqa: E731
        values = draw(net) if drawn_too else dict(net.state_dict())
        model = Model(values, anatomy=net.anatomy(), make=make, draw=draw, classes=self.task.classes)
        if self.recipe.algorithm.low_rank:
            return freeze(model, self.recipe.model.w0, self.settings.alpha, first)
        return model

    @property
    def alone(self) -> Algorithm:
        """How a client trains without the others: the plain network, or what its rule trains by that rule."""
        rule: Algorithm = self.recipe.algorithm
        return rule if rule.low_rank or rule.network != FedAvg.network else FedAvg()

    @property
    def notes(self) -> list[str]:
        """What the summary's numbers were computed from."""
        norm, batch = self.recipe.model.norm, self.settings.test_batch_size
        kinds = {
            "batch": f"statistics of each test batch of {batch}",
            "running": "running statistics",
            "gn": "no batch",
        }
        if self.settings.statistics == "static":
            kinds["batch"] = "statistics gathered from training batches"
        examples = self.tested or self.recipe.data.test_rows or self.task.rows["test"]
        return [f"{examples} test examples of {self.recipe.data_name}; norms at the test: {kinds[norm]}."]

    def worker(self, on_step: Callable[[float | None], None]) -> VisionWorker:
        """Decodes the examples; everything before this is light."""
        data, seed = self.recipe.data, self.recipe.run.seed
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        train = self.task.load(data.path, "train", data.train_rows, seed)
        test = self.task.load(data.path, "test", data.test_rows, seed)
        self.tested = len(test)
        parts = like_train(
            data.partition, self.labels, None if test.y is None else test.y.tolist(), len(test), self.clients, seed
        )
        return VisionWorker(
            self.settings,
            self.task,
            self.model,
            train,
            test,
            self.parts,
            {client.id: part for client, part in zip(self.clients, parts, strict=True)},
            self.recipe.run.rounds,
            device,
            on_step,
            self.own,
        )

    def export(self, place: Path, update: Tensors, client: Client | None = None) -> None:
        """Writes the weights and, as JSON, the description from which `fedllm.models.network` builds the network."""
        files.make_folder(place)
        files.write(place / "model.safetensors", save(ledger.flatten(plain(self.model, update))))
        model = self.recipe.model if client is None else self.recipe.model.of(client)
        described = {
            "model": dataclasses.asdict(model),
            "variant": self.recipe.algorithm.network,
            "classes": self.task.classes,
            "length": self.task.shape[0],
        }
        run_folder.write(place / "network.json", json.dumps(described, indent=1))

    def plan(self) -> dict[str, Any]:
        """Who trains what, what travels and what the papers' columns of the whole run are; plain JSON values.

        ``levels`` are counted from the networks; ``totals`` from the cohorts that this seed will draw.
        ``comm_paper_gb`` is the papers' column (a byte a parameter, one direction), ``comm_bytes`` 4 bytes a number
        that travels, both ways.
        """
        recipe, rounds = self.recipe, self.recipe.run.rounds
        state = recipe.algorithm.init(self.model, self.clients)
        first, run = 1, None
        levels: list[Level] = []
        for length in recipe.algorithm.phases(rounds):
            if not length:
                continue
            suffix = "" if length == rounds else f"@{first}"
            counted = {level.name: level for level in self._levels(state, first, suffix)}
            drawn_levels: dict[str, float] = dict.fromkeys(counted, 0.0)
            for index in range(first, first + length):
                for client in sample(
                    self.clients, recipe.clients.participation, Round(index, recipe.run.seed, rounds=rounds)
                ):
                    drawn_levels[level_of(client) + suffix] += 1
            part = totals(counted.values(), drawn_levels)
            run = (
                part
                if run is None
                else dataclasses.replace(
                    run,
                    comm_paper_gb=run.comm_paper_gb + part.comm_paper_gb,
                    comm_bytes=run.comm_bytes + part.comm_bytes,
                    flops_paper_1e12=run.flops_paper_1e12 + part.flops_paper_1e12,
                )
            )
            levels += counted.values()
            first += length
        assert run is not None
        clients = list(self._clients(state))
        cohort = len(sample(self.clients, recipe.clients.participation, Round(1, recipe.run.seed)))
        per_round = sum(client["bytes_down"] + client["bytes_up"] for client in clients) / len(clients) * cohort
        return {
            "clients": clients,
            "levels": [
                {key: getattr(level, key) for key in ("name", "params", "forward_cost", "down_params", "up_params")}
                for level in levels
            ],
            "totals": {
                "rounds": rounds,
                "clients": len(clients),
                "cohort": cohort,
                "rows": sum(client["rows"] for client in clients),
                "dropped_rows": 0,
                "undealt_rows": self.partition["undealt_rows"],
                "run_bytes": round(per_round * rounds),
                **run.json(),
            },
            "guessed": self.guessed,
            "at_most": recipe.algorithm.at_most,
        }

    guessed = False

    def _members(self) -> list[Client]:
        clients = self.recipe.clients
        unknown = [level for level in clients.levels if level not in LEVELS]
        if unknown:
            raise FedError(f"clients.levels: there is no level {unknown[0]!r}. Valid: {', '.join(LEVELS)}.")
        own = self.recipe.model.own
        if own and (self.recipe.algorithm_name not in PRIVATE or clients.levels):
            raise FedError(
                f"model.own={list(own)} gives clients networks that differ: take no clients.levels, and one of the "
                f"rules that leave a network with its client: {', '.join(PRIVATE)}."
            )
        if self.recipe.algorithm.low_rank:
            if clients.levels:
                raise FedError(
                    f"clients.levels={list(clients.levels)}: with algorithm.name={self.recipe.algorithm_name} clients "
                    "differ by their rank alone. Set clients.rank."
                )
            return [Client(f"c{i}", 0, rank) for i, rank in enumerate(clients.ranks())]
        n = clients.count or max(1, len(clients.levels))
        if own:
            return [Client(f"c{i}", 0, level=own[i % len(own)]) for i in range(n)]
        if not clients.levels:
            return [Client(f"c{i}", 0) for i in range(n)]
        return [
            Client(f"c{i}", 0, width=LEVELS[level][0], depth=LEVELS[level][1], level=level)
            for i, level in enumerate(assign(n, clients.levels))
        ]

    def _labels(self, split: str, most: int | None) -> Sequence[Hashable] | int:
        """Every example's class, or their number where there are no classes or, for a plan, no data."""
        data = self.recipe.data
        try:
            return self.task.labels(data.path, split, most, self.recipe.run.seed)
        except Unreachable:
            if not self.recipe.run.plan:
                raise
            self.guessed = True
            return min(most or self.task.rows[split], self.task.rows[split])

    def labels_of(self, client: Client) -> Tensor:
        """The classes that a client has, ascending; all of them where nobody knows."""
        if self.labels is None:
            return torch.arange(self.task.classes)
        return torch.from_numpy(np.unique(np.asarray(self.labels)[self.parts[client.id]]))

    def _visit(self, state: Tensors, client: Client, rnd: Round) -> tuple[Tensors, Tensors, DryRunClient]:
        """What the client is sent, what it returns, and what it trains."""
        dry = DryRunClient(self, client)
        sent = ledger.canonical(self.recipe.algorithm.download(state, client, rnd))
        returned, _, _ = self.recipe.algorithm.local(dry, sent, {}, rnd)
        return sent, returned, dry

    def _levels(self, state: Tensors, first: int, suffix: str) -> Iterator[Level]:
        rnd = Round(first, self.recipe.run.seed, rounds=self.recipe.run.rounds)
        for level, client in {level_of(client): client for client in self.clients}.items():
            sent, returned, dry = self._visit(state, client, rnd)
            net: nn.Module = fitted(dry.model.make(), dry.trained, dry.alphas, frozen=dry.model.frozen or ())
            cost = forward_cost(net, self.task.shape, self.task.dtype).total
            params = sum(p.numel() for p in net.parameters())
            yield Level(level + suffix, params, cost, sizes(sent), sizes(returned))

    def _clients(self, state: Tensors) -> Iterator[dict[str, Any]]:
        """Bytes are those of round 1, exact; the same for all clients of a level with as many classes."""
        rnd = Round(1, self.recipe.run.seed, rounds=self.recipe.run.rounds)
        bytes_of: dict[tuple[str, int], tuple[int, int]] = {}
        for client in self.clients:
            alike = level_of(client), len(self.labels_of(client))
            if alike not in bytes_of:
                sent, returned, _ = self._visit(state, client, rnd)
                bytes_of[alike] = ledger.size(sent), ledger.size(returned)
            down, up = bytes_of[alike]
            rows = client.num_samples
            steps = self.settings.steps_for(rows)
            yield {
                "id": client.id,
                "level": level_of(client),
                "rows": rows,
                "steps": steps,
                "bytes_down": down,
                "bytes_up": up,
            }


def level_of(client: Client) -> str:
    """What clients that do and send the same have in common."""
    return client.level or (f"rank {client.rank}" if client.rank else "all")


def like_train(
    partition: Partition,
    train: Sequence[Hashable] | None,
    test: Sequence[Hashable] | None,
    n: int,
    clients: Sequence[Client],
    seed: int,
) -> list[list[int]]:
    """The test examples dealt out as the training examples were; a client may get none.

    A Dirichlet partition's draws are used again, with the cap on the test counts and no smallest share; the other rules
    draw the same classes for the same clients from the same seed.
    """
    if not isinstance(partition, Dirichlet) or train is None or test is None:
        try:
            return partition.split(test, n, clients, seed)
        except FedError:  # fewer test examples than clients: nobody is scored on their own
            return [[] for _ in clients]
    classes = sorted(set(train), key=str)
    sizes_of = [sum(1 for label in train if label == c) for c in classes]
    rows = [[i for i, label in enumerate(test) if label == c] for c in classes]
    shares = dirichlet_shares(sizes_of, len(clients), partition.eta, seed, partition.minimum)
    parts: list[list[int]] = [[] for _ in clients]
    for own, counts in zip(rows, capped([len(own) for own in rows], shares), strict=True):
        for part, piece in zip(parts, np.split(np.array(own, dtype=int), np.cumsum(counts)[:-1]), strict=True):
            part.extend(piece.tolist())
    return [sorted(part) for part in parts]
