"""The sections of a recipe's page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fedllm.algorithms.compositions.local_step import LocalStep
from fedllm.algorithms.compositions.server_step import Server
from fedllm.config.rank_profiles import PROFILES
from fedllm.config.suggest import nearest
from fedllm.config.types import Count, Positive, Seed, Share, SomeShare, Whole, needs
from fedllm.core import Algorithm, Client
from fedllm.data.partition import IID
from fedllm.errors import FedError
from fedllm.fleets.faults import Faults
from fedllm.privacy.guarantee import Guarantee, guarantee
from fedllm.privacy.settings import Privacy
from fedllm.rounds import Policy
from fedllm.server.robust import Trust
from fedllm.wire.compression import Wire

SECTIONS = (
    "run",
    "algorithm",
    "model",
    "data",
    "clients",
    "worker",
    "eval",
    "hub",
    "admission",
    "robust",
    "faults",
    "wire",
    "server",
    "local",
    "privacy",
)


MOST_CLIENTS = 1_000_000
"""Clients of a run: each is an object, and has its own rows."""


@dataclass(frozen=True)
class Run:
    """The run itself.

    Args:
        rounds: communication rounds, ``T``.
        output: the run's folder; ``runs/NAME`` of the recipe by default.
        resume: continue from the last finished round in that folder.
        overwrite: delete an earlier run there first.
        seed: of everything: weights of a random model, partition, cohorts, client training.
        plan: print who would train what, and stop.
        parallel: what several processes do: each trains ``clients`` of its own; or all train one client at a time, each
            on its part of every step's rows, with a copy of the base model (``ddp``) or a shard of it (``fsdp``).
        threads: of each process on the CPU; by default its share of the cores (``accelerate launch`` gives 1).
        quorum: share of a cohort whose updates must be usable, in [0, 1]; one update is needed in any case.
        attempts: how often a round is tried, each time with another cohort, before the run ends for want of a quorum.
        deadline: seconds after which a client's update is too late; ``null`` waits for everybody.
        on_client_error: an exception in a client's training, out of memory included, fails that client (``refuse``) or
            ends the run with the traceback (``stop``).
        tracker: where the server logs the federation: ``auto`` is trackio, in the run's folder, where it is installed.
    """

    rounds: Count = 1
    output: str | None = None
    resume: bool = False
    overwrite: bool = False
    seed: Seed = 0
    plan: bool = False
    parallel: Literal["clients", "ddp", "fsdp"] = "clients"
    threads: Count | None = None
    quorum: Share = 0.0
    attempts: Count = 3
    deadline: Positive | None = None
    on_client_error: Literal["refuse", "stop"] = "refuse"
    tracker: Literal["auto", "none", "trackio", "tensorboard", "wandb"] = "auto"


@dataclass(frozen=True)
class Clients:
    """Who takes part.

    Args:
        rank: one rank for all, one rank each, or a profile of the FedHL paper by name.
        count: how many clients; by default as many as ranks are given. A profile or list is stretched evenly to it.
        participation: share of the clients that a round's cohort holds, in (0, 1].
        levels: capacity levels, assigned in equal blocks (sub-model algorithms).
    """

    rank: Annotated[Count | tuple[Count, ...] | str, needs("a rank from 1 up, a list of them, or a profile's name")] = 8
    count: Count | None = None
    participation: SomeShare = 1.0
    levels: tuple[str, ...] = ()

    def ranks(self, named: int | None = None) -> list[int]:
        """One rank per client.

        Args:
            named: how many clients the data names, where it does.
        """
        if named is not None and self.count not in (None, named):
            raise FedError(f"clients.count={self.count}, and the data names {named} clients: leave clients.count out.")
        if self.count and self.count > MOST_CLIENTS:
            raise FedError(f"clients.count={self.count}: a run has {MOST_CLIENTS} clients at most.")
        if isinstance(self.rank, int):
            ranks: Sequence[int] = [self.rank]
        elif isinstance(self.rank, str):
            if self.rank not in PROFILES:
                if re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", self.rank):
                    raise FedError(f"clients.rank={self.rank!r} is a text: ranks are clients.rank=[{self.rank}].")
                raise FedError(f"clients.rank={self.rank}: {nearest(self.rank, PROFILES, 'rank profile')}")
            ranks = PROFILES[self.rank]
        else:
            ranks = self.rank
        if not ranks or min(ranks) < 1:
            raise FedError(f"clients.rank={self.rank}: a rank is a whole number from 1 up.")
        count = self.count or named or len(ranks)
        if count % len(ranks):
            raise FedError(
                f"clients.count={count} clients cannot share {len(ranks)} ranks evenly: give a multiple of it."
            )
        return [rank for rank in ranks for _ in range(count // len(ranks))]


@dataclass(frozen=True)
class Data:
    """Which rows, and who holds them.

    Args:
        task: the corpus with its prompt, target and scores (``data.name`` and the task's own keys).
        path: a local file or folder instead of the Hub.
        train_rows: use this many training rows at most, the first of a seeded shuffle.
        test_rows: score this many test rows at most, likewise.
        partition: how the training rows are dealt out to the clients.
    """

    task: Any
    path: str | None = None
    train_rows: Count | None = None
    test_rows: Count | None = None
    partition: Any = IID()


@dataclass(frozen=True)
class Evaluation:
    """Scores inside the run, of the update that the server would serve.

    Args:
        every: evaluate after every so many rounds; the last round always. 0: the last round only.
        base: score the untouched model too, before round 1.
        generate: generate answers and score them; the held-out loss alone otherwise.
        clients: score each client's own model of the last round too.
        alone: also train this client by itself, for as many steps as in the federation; or several, or ``all``.
        batch_size: rows generated at once.
        max_new_tokens: cut an answer off here; the task's own limit by default.
        allow_code_execution: run the programs that the model writes, in the sandbox, where the task's score is that.
        accept_missing: guarantees of the sandbox to do without where this machine does not give them.
    """

    every: Whole = 0
    base: bool = True
    generate: bool = True
    clients: bool = False
    alone: Annotated[
        Whole | tuple[Whole, ...] | Literal["all"] | None, needs("a client's number from 0 up, a list of them, all")
    ] = None
    batch_size: Count = 32
    max_new_tokens: Count | None = None
    allow_code_execution: bool = False
    accept_missing: tuple[str, ...] = ()

    def alone_of(self, count: int) -> list[int]:
        """The places, among ``count`` clients, of those that also train by themselves."""
        if self.alone is None:
            return []
        if self.alone == "all":
            return list(range(count))
        return [self.alone] if isinstance(self.alone, int) else list(self.alone)


@dataclass(frozen=True)
class Hub:
    """What a run ends in, and what the Hugging Face Hub gets of it. The token is never a key: ``hf auth login``.

    Args:
        push: upload the adapter with its model card when the run is done.
        repo: ``owner/name``; made where it does not exist.
        private: make it so, and refuse one that is public.
        dry_run: list what would be uploaded, and upload nothing.
        merged: end in the merged model too, in the run's ``merged/``; an upload then has the adapter in ``adapter/``.
        clients: keep and upload each client's own adapter of the last round too.
        dtype: of the merged model; ``auto`` is the base model's.
        license: of what is uploaded; the base model's by default, where it is known.
        rank: of the exported adapter, the best approximation of it; by default all of the result is kept, whose rank
            can be the sum of the clients'.
    """

    push: bool = False
    repo: str | None = None
    private: bool = True
    dry_run: bool = False
    merged: bool = False
    clients: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    license: str | None = None
    rank: Count | None = None


@dataclass(frozen=True)
class Admission:
    """What an update must be, beyond its names, shapes, ranks and finite values.

    Args:
        norm_bound: refuse an update that moved this many times as far as the cohort's median; ``null``: none is too
            far.
    """

    norm_bound: Positive | None = None


@dataclass(frozen=True)
class Recipe:
    """All of one run. Frozen, complete, and printable: what is not written in the page is the default here."""

    name: str
    run: Run
    algorithm: Algorithm
    algorithm_name: str
    model: Any
    data: Data
    data_name: str
    clients: Clients
    worker: Any
    worker_name: str
    eval: Evaluation = field(default_factory=Evaluation)
    hub: Hub = field(default_factory=Hub)
    admission: Admission = Admission()
    robust_name: str = "none"
    robust: Trust = Trust()
    faults: Faults = Faults()
    wire: Wire = Wire()
    server: Server = Server()
    local: LocalStep = LocalStep()
    privacy: Privacy = Privacy()
    page: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def policy(self) -> Policy:
        """What a round needs to count."""
        run = self.run
        return Policy(run.quorum, run.attempts, run.deadline, self.admission.norm_bound, self.robust)

    @property
    def models(self) -> str:
        """What clients train, by name: the model of all of them, or their own."""
        return ", ".join(dict.fromkeys(self.model.own)) or self.model.name

    def guarantee(self, clients: Sequence[Client]) -> Guarantee:
        """What a run with these clients, whose rows are known, guarantees."""
        return guarantee(
            self.privacy,
            clients,
            participation=self.clients.participation,
            rounds=self.run.rounds,
            seed=self.run.seed,
            folder=self.output,
            batch_size=self.worker.batch_size,
            steps=getattr(self.worker, "steps", None),
        )

    @property
    def rule(self) -> str:
        """The rule as tables name it; with ``privacy.unit=client`` it is not its paper's."""
        return f"{self.algorithm_name}{', B only, equal weights' * (self.privacy.unit == 'client')}"

    @property
    def output(self) -> Path:
        return Path(str(self.run.output))

    @property
    def unpublished(self) -> Path:
        """The part of the run's folder that holds what its guarantee does not cover."""
        return self.output / "private" if self.privacy.unit == "client" else self.output
