"""From a recipe to a federation of text clients: rows, clients, plan, and the worker that trains and scores them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fedllm.algorithms import ALGORITHMS
from fedllm.algorithms.lora.fedit import FedIT
from fedllm.core import Client, ClientWorker, LocalResult, LocalTraining, Model, Round, Score, Tensors, within
from fedllm.data.encoding import Encoded, encode
from fedllm.data.partition import IID, describe
from fedllm.errors import FedError, Unreachable
from fedllm.lowrank import LowRank, fill
from fedllm.models import language
from fedllm.privacy.cohorts import size
from fedllm.privacy.guarantee import ExampleGuarantee, Guarantee
from fedllm.recipe.checks import check_alone
from fedllm.recipe.sections import Recipe
from fedllm.sandbox.runner import require
from fedllm.storage import files
from fedllm.storage import peft_folder as adapters
from fedllm.wire import serialization as ledger
from fedllm.workers.dp_sgd import DPSGD
from fedllm.workers.lora import target_shapes
from fedllm.workers.scoring import device, measured
from fedllm.workers.settings import SFT
from fedllm.workers.sft import SFTWorker, processes
from fedllm.workers.sft_own_models import OwnWorker

Row = Mapping[str, Any]


@dataclass(frozen=True)
class DryRunClient(ClientWorker):
    """A client that returns what it is sent: the plan learns what travels, without training.

    Args:
        federation: where the client takes part.
        client: whom it stands for.
    """

    federation: TextFederation
    client: Client

    @property
    def model(self) -> Model:
        """The client's adapter, where the rule leaves it with the client."""
        return self.federation.own(self.client)

    @property
    def steps(self) -> int:
        return self.federation.settings.steps_for(len(self.federation.rows[self.client.id]))

    def fit(self, request: LocalTraining) -> LocalResult:
        return LocalResult(request.nested or request.weights, request.memory, {})

    def outputs(
        self, weights: Tensors, forward: Callable[..., object] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Zeros, an answer for each label; a few at a time, vocabularies are wide."""
        for y in self.federation.labels(self.client).split(64):
            yield torch.zeros(len(y), self.federation.classes), y


UNENDED = "from them the model does not learn to stop"


class TextFederation:
    """Everything about a run of language-model clients that is known before a weight is loaded.

    Args:
        recipe: the resolved recipe, whose worker is ``SFT``. Where it only asks for a plan and the Hub cannot be
            reached, the known number of rows stands in for them, each as long as it may be.

    Raises:
        FedError: rows that cannot be had, clients without rows, a rank above a weight's size.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.settings: SFT = recipe.worker
        self.test: list[Row] = []  # held out; none where a plan has to guess
        self.scored: list[Encoded] = []  # those of them that truncation leaves something to score
        _fits(recipe)
        if recipe.data.task.runs_code and recipe.eval.generate and not recipe.run.plan:
            _allowed(recipe)
        data, partition = recipe.data, recipe.data.partition
        members = None if partition.names_clients else self._admitted(None)
        self.guessed = False
        try:
            train = self._rows("train", data.train_rows)
            if members is None:
                members = self._admitted(partition.clients(self._labels(train) or ()))
            self.tokenizer = language.common_tokenizer(recipe.model)
            self.classes = 1 + max(self.tokenizer.get_vocab().values())
            encoded = self._encode(train)
            self.test = self._rows("test", data.test_rows)
            self.scored = [row for row in self._encode(self.test) if row.trained]
            if not self.scored:
                raise FedError(
                    f"none of the {len(self.test)} held-out rows has a completion that survives worker.max_length="
                    f"{self.settings.max_length}: raise it."
                )
        except Unreachable:
            if not recipe.run.plan:
                raise
            self.guessed = True
            members = members or self._admitted(None)
            self.classes = self.skeletons[members[0].level].config.vocab_size
            train = [{}] * min(data.train_rows or data.task.rows["train"], data.task.rows["train"])
            encoded = [Encoded([0] * self.settings.max_length, [0] * self.settings.max_length)] * len(train)
        if not self.guessed:
            self._check_positions([*encoded, *self.scored])
        if self.guessed and partition.column:  # no rows, no labels
            partition = IID()
        labels = None if self.guessed else self._labels(train)
        parts = partition.split(labels, len(train), members, recipe.run.seed)
        kept = [[i for i in part if encoded[i].trained] for part in parts]
        for member, part in zip(members, kept, strict=True):
            if not part:
                raise FedError(
                    f"client {member.id} has no row whose completion survives worker.max_length="
                    f"{self.settings.max_length}: raise it, or give the client more rows."
                )
        self.clients = tuple(
            dataclasses.replace(member, num_samples=len(part)) for member, part in zip(members, kept, strict=True)
        )
        self.rows = {client.id: [encoded[i] for i in part] for client, part in zip(self.clients, kept, strict=True)}
        kind, cut = recipe.page["data"]["partition"]["name"], sum(len(part) for part in parts) - sum(map(len, kept))
        self.partition = describe(kind, kept, labels, len(train) - cut, self.clients, recipe.run.seed)
        self.partition["dropped_rows"] = cut
        self.partition["cut_rows"] = sum(row.cut for rows in self.rows.values() for row in rows)
        shared = self.shapes[members[0].level]
        weights = {name: torch.empty(shape, device="meta") for name, shape in shared.items()}
        self.model = Model(weights, classes=self.classes)
        recipe.robust.check(
            recipe.algorithm, self.model, self.clients, size(self.clients, recipe.clients.participation)
        )

    alone = FedIT()
    """How a client trains without the others: nothing is averaged, and nothing is lost."""

    @property
    def notes(self) -> list[str]:
        """What the summary's numbers were computed from."""
        dropped, undealt = self.partition["dropped_rows"], self.partition["undealt_rows"]
        lost = self.partition["cut_rows"]
        trained = sum(len(rows) for rows in self.rows.values())
        cut = len(self.test) - len(self.scored)
        told = [
            (True, f"{len(self.test)} held-out rows of {self.recipe.data_name}; loss in nats per completion token."),
            (cut, f"{cut} held-out rows lost their completion to max_length: the loss is that of the others."),
            (dropped, f"{dropped} training rows lost their completion to max_length and were left out."),
            (lost, f"{lost} of {trained} training rows lost the end of their completion to max_length: {UNENDED}."),
            (undealt, f"{undealt} training rows were dealt to nobody by the partition."),
        ]
        return [note for holds, note in told if holds]

    def own(self, client: Client) -> Model:
        """A client's adapter before it trains, where it is the client's own: the same for all of a base and a rank."""
        rnd = Round(0, self.recipe.run.seed)
        weights = {
            name: fill(LowRank.zeros(*shape), client.rank, rnd.rng("initial", name))
            for name, shape in self.shapes[client.level].items()
        }
        return Model(weights, classes=self.classes)

    def labels(self, client: Client) -> Tensor:
        """The tokens of a client's completions, ascending; all there are where nobody knows."""
        if self.guessed:
            return torch.arange(self.classes)
        return torch.tensor(sorted({label for row in self.rows[client.id] for label in row.labels[1:]} - {-100}))

    def worker(self, on_step: Callable[[float | None], None]) -> TextWorker | OwnWorker:
        """Loads the model; everything before this is light. Models of the clients' own are loaded as they are used."""
        if self.recipe.algorithm.any_model:
            return OwnWorker(self, on_step)
        shards = processes() if self.recipe.run.parallel == "fsdp" else 1
        return TextWorker(self, language.load(self.recipe.model, device(), self.recipe.run.seed, shards), on_step)

    def export(self, place: Path, update: Tensors, client: Client | None = None) -> None:
        """Writes ``update`` as a PEFT folder, on the base model of ``client`` or of all; shared tensors as they are."""
        if shared := within("shared", update):
            files.make_folder(place)
            files.write(place / "shared.safetensors", save(ledger.flatten(shared)))
            return
        model = self.recipe.model if client is None else self.recipe.model.of(client)
        adapters.write(place, update, base_model=model.name, targets=self.settings.targets, overwrite=True)
        with files.writing(place):
            self.tokenizer.save_pretrained(place)

    def plan(self) -> dict[str, Any]:
        """Who trains what, what travels, and what a client's machine must hold; plain JSON values.

        Bytes are those of round 1, exact. Memory is an estimate: weights, the adapter with its gradient and AdamW's two
        moments in float32, and for activations what a forward and backward pass of one batch of the longest row keeps.
        """
        algorithm, rnd = self.recipe.algorithm, Round(1, self.recipe.run.seed)
        state = algorithm.init(self.model, self.clients)
        base = {level: self._base_bytes(net) for level, net in self.skeletons.items()}
        clients: list[dict[str, Any]] = []
        for client in self.clients:
            rows, rank = self.rows[client.id], client.rank
            sent = algorithm.download(state, client, rnd)
            returned, _, _ = algorithm.local(DryRunClient(self, client), sent, {}, rnd)
            steps = self.settings.steps_for(len(rows))
            passes = steps / self.settings.steps_in_epoch(len(rows))
            adapter = rank * sum(d_out + d_in for d_out, d_in in self.shapes[client.level].values())
            activations = self._activation_bytes(
                self.skeletons[client.level].config, max(len(row.input_ids) for row in rows)
            )
            clients.append(
                {
                    "id": client.id,
                    **({"level": client.level} if client.level else {}),
                    "rank": rank,
                    "alpha": self.settings.alpha_of(rank),
                    "scale": self.settings.scale(rank),
                    "rows": len(rows),
                    "steps": steps,
                    "tokens": round(passes * sum(len(row.input_ids) for row in rows)),
                    "trainable_parameters": adapter,
                    "memory_bytes": base[client.level] + 16 * adapter + activations,
                    "bytes_down": ledger.size(sent),
                    "bytes_up": ledger.size(returned),
                }
            )
        share = self.recipe.clients.participation
        totals = {key: sum(c[key] for c in clients) for key in ("rows", "steps", "tokens", "bytes_down", "bytes_up")}
        cohort = max(1, int(share * len(clients) + 1e-9))
        totals |= {
            "rounds": self.recipe.run.rounds,
            "clients": len(clients),
            "cohort": cohort,
            "dropped_rows": self.partition["dropped_rows"],
            "cut_rows": self.partition["cut_rows"],
            "undealt_rows": self.partition["undealt_rows"],
            "base_bytes": max(base.values()),
            "run_bytes": round(
                (totals["bytes_down"] + totals["bytes_up"]) * self.recipe.run.rounds * cohort / len(clients)
            ),
        }
        told = {"privacy": self._privacy(state, rnd)} if self.recipe.privacy.unit != "none" else {}
        return {"clients": clients, "levels": [], "totals": totals, "guessed": self.guessed, **told}

    def _privacy(self, state: Tensors, rnd: Round) -> list[str]:
        """What the plan says of the guarantee."""
        guarantee = self.recipe.guarantee(self.clients)
        return [*guarantee.lines, *guarantee.price(self.recipe.algorithm, state, self.clients, rnd)]

    def _admitted(self, ids: Sequence[str] | None) -> list[Client]:
        """The clients, without rows yet, and the shapes of their models: all are checked, no weight is loaded."""
        recipe = self.recipe
        members = members_of(recipe, ids)
        recipe.algorithm.validate(members)
        check_alone(recipe, len(members))
        self.skeletons: dict[str, Any] = {
            level: language.skeleton(recipe.model.of(member))
            for level, member in {member.level: member for member in members}.items()
        }
        self.shapes = {level: target_shapes(net, self.settings.targets) for level, net in self.skeletons.items()}
        self._check_ranks(members)
        return members

    def _labels(self, rows: Sequence[Row]) -> list[Hashable] | None:
        """Each row's label, where the partition has a column for it."""
        column = self.recipe.data.partition.column
        return None if column is None else [self.recipe.data.task.label(row, column) for row in rows]

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        task = self.recipe.data.task
        return encode(
            self.tokenizer, [task.prompt(r) for r in rows], [task.target(r) for r in rows], self.settings.max_length
        )

    def _rows(self, split: str, most: int | None) -> list[Row]:
        rows = self.recipe.data.task.load(self.recipe.data.path, split)
        if not rows:
            raise FedError(f"data.name={self.recipe.data_name}: the {split} split has no rows.")
        if most is None or most >= len(rows):
            return list(rows)
        if most < 1:
            raise FedError(f"data.{split}_rows={most}: at least 1, or null for all of them.")
        order = np.random.default_rng([self.recipe.run.seed, 0 if split == "train" else 1]).permutation(len(rows))
        return [rows[i] for i in order[:most]]

    def _check_ranks(self, members: Sequence[Client]) -> None:
        for member in members:
            name, shape = min(self.shapes[member.level].items(), key=lambda item: min(item[1]))
            if member.rank > min(shape):
                raise FedError(
                    f"client {member.id} has rank {member.rank}, and {name} is {shape[0]} x {shape[1]}: "
                    f"a rank is at most {min(shape)} here. Lower clients.rank."
                )

    def _check_positions(self, rows: Sequence[Encoded]) -> None:
        """Raises FedError where a row, or a prompt and its answer, is longer than a model can place."""
        asked = self.recipe.eval
        answer = (asked.max_new_tokens or self.recipe.data.task.max_new_tokens) if asked.generate else 0
        longest = max(len(row.input_ids) for row in rows)
        prompt = max(next(i for i, label in enumerate(row.labels) if label != -100) for row in self.scored)
        for net in self.skeletons.values():
            most = language.positions(net)
            if most and longest > most:
                raise FedError(
                    f"the longest row has {longest} tokens, and the model places {most}: worker.max_length={most}."
                )
            if most and prompt + answer > most:
                raise FedError(
                    f"the longest prompt has {prompt} tokens, an answer may have {answer}, the model places {most}: "
                    f"eval.max_new_tokens={most - prompt}."
                )

    def _base_bytes(self, skeleton: nn.Module) -> int:
        model = self.recipe.model
        bits = {"4bit": 4.5, "8bit": 8.0, "none": 32.0}[model.quantization]  # NF4: and its block constants
        if bits == 32.0 and (model.dtype in {"bfloat16", "float16"} or torch.cuda.is_available()):
            bits = 16.0
        linear = sum(m.weight.numel() for m in skeleton.modules() if isinstance(m, nn.Linear))
        other = sum(p.numel() for p in skeleton.parameters()) - linear
        return int(linear * bits / 8 + other * max(bits, 16.0) / 8)

    def _activation_bytes(self, config: Any, longest: int) -> int:
        tokens = longest * self.settings.batch_size
        per_layer = (
            2 if self.settings.gradient_checkpointing else 34
        )  # half-words a token and unit (Korthikanti et al.)
        return tokens * config.hidden_size * config.num_hidden_layers * per_layer + 4 * tokens * config.vocab_size


def members_of(recipe: Recipe, ids: Sequence[str] | None = None) -> list[Client]:
    """Every client with its rank and base model: ``c0`` and so on, or the names that the data gives."""
    own = recipe.model.own
    ranks = recipe.clients.ranks(None if ids is None else len(ids))
    names = ids if ids is not None else [f"c{i}" for i in range(len(ranks))]
    return [
        Client(id, 0, rank, level=own[i % len(own)] if own else "")
        for i, (id, rank) in enumerate(zip(names, ranks, strict=True))
    ]


class TextWorker:
    """Trains and scores; see ``SFTWorker`` for the training."""

    def __init__(self, federation: TextFederation, base: nn.Module, on_step: Callable[[float | None], None]) -> None:
        recipe = federation.recipe
        self.federation, self.tokenizer = federation, federation.tokenizer
        self.guarantee = recipe.guarantee(federation.clients)
        self.sft = SFTWorker(
            recipe.worker, base, self.tokenizer, federation.rows, recipe.run.rounds, on_step, _private(self.guarantee)
        )

    def of(self, client: Client) -> ClientWorker:
        return self.guarantee.on_client(self.sft.of(client))

    def evaluate(self, update: Tensors) -> Score:
        """Held-out loss of the base model plus ``update``, and the task's scores of its generated answers."""
        with self.sft.serving(update) as model:
            return measured(model, self.federation)


def _private(guarantee: Guarantee) -> DPSGD | None:
    """How clients' steps are made private, where that is what the run guarantees."""
    if not isinstance(guarantee, ExampleGuarantee):
        return None
    settings = guarantee.settings
    return DPSGD(guarantee.noise_multiplier, settings.clip, guarantee.batch_size, seeded=settings.noise == "seeded")


def _fits(recipe: Recipe) -> None:
    """Before a weight is loaded: what a rule does with clients whose adapters are their own, and what it cannot do."""
    rule, own = recipe.algorithm_name, list(recipe.model.own)
    if own and not recipe.algorithm.any_model:
        fit = ", ".join(name for name, kind in ALGORITHMS.items() if kind.any_model)
        raise FedError(
            f"model.own={own} gives clients base models that differ, and {rule} averages their adapters: "
            f"take one of the rules that leave an adapter with its client: {fit}."
        )
    kept, alone = recipe.worker.optimizer == "kept", recipe.eval.alone is not None
    parallel = recipe.run.parallel
    for asked, key, why in (
        (parallel != "clients", f"run.parallel={parallel}", "a client answers from one process, run.parallel=clients"),
        (kept, "worker.optimizer=kept", "a client's optimizer starts afresh in every round"),
        (recipe.eval.clients, "eval.clients=true", "own_... are every client's scores in each of its rounds"),
        (alone, "eval.alone", "algorithm.name=standalone is that, for all clients"),
    ):
        if asked and recipe.algorithm.any_model:
            raise FedError(f"{key} does not go with algorithm.name={rule}: {why}.")


def _allowed(recipe: Recipe) -> None:
    """Before a weight is loaded: the score of this task runs what the model writes."""
    if not recipe.eval.allow_code_execution:
        raise FedError(
            f"data.name={recipe.data_name} is scored by running the programs that the model writes: allow it with "
            "eval.allow_code_execution=true (they run in a sandbox), or set eval.generate=false for the loss alone."
        )
    require(recipe.eval.accept_missing)
