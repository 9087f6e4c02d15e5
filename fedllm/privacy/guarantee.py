"""What a round does so that a run's statement of privacy is true, and what it says of it.

The loop lets every round flow through one of these: who takes part, what is counted before the first client trains,
which replies the rule is given, and which of the round's numbers may leave the server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.core import Algorithm, Client, ClientWorker, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.privacy import accountant, cohorts, ledger, mechanism, noise
from fedllm.privacy.accountant import Release
from fedllm.privacy.b_only import BOnly
from fedllm.privacy.settings import Privacy
from fedllm.wire import serialization

USELESS = 5.0
"""Noise of so many clips a round leaves next to nothing of what clients learned: they can move one clip at most."""


@dataclass(frozen=True)
class Guarantee:
    """None: a round as it is."""

    def least(self, wanted: int) -> int:
        """Replies that a round needs."""
        return wanted

    def cohort(self, clients: Sequence[Client], participation: float, rnd: Round) -> list[Client]:
        """Who takes part."""
        return cohorts.uniform(clients, participation, rnd)

    def affords(self, clients: Sequence[Client], rnd: Round) -> bool:
        """Whether this round stays within the budget."""
        return True

    def begins(self, cohort: Sequence[Client], rnd: Round) -> None:
        """Called before the first client of a round trains."""

    def released(
        self, rule: Algorithm, state: Tensors, clients: Sequence[Client], replies: Sequence[Reply], rnd: Round
    ) -> list[Reply]:
        """What the rule is given in place of the replies."""
        return list(replies)

    def told(self, record: Mapping[str, Any], replies: Sequence[Reply], rnd: Round) -> dict[str, Any]:
        """What anybody may know of the round's record; ``replies`` are those that the rule was given."""
        return dict(record)

    def on_client(self, worker: ClientWorker) -> ClientWorker:
        """How a client's worker trains."""
        return worker

    def price(self, rule: Algorithm, state: Tensors, clients: Sequence[Client], rnd: Round) -> list[str]:
        """What the noise costs, as far as that is known before a run."""
        return []

    def partition(self, partition: Mapping[str, Any]) -> dict[str, Any]:
        """What anybody may know of who holds what."""
        return dict(partition)

    @property
    def lines(self) -> list[str]:
        """What the plan, the report and the card say, a sentence each."""
        return []


@dataclass(frozen=True)
class Spending(Guarantee):
    """A budget, and what is spent of it.

    Args:
        settings: the section ``privacy``.
        clients: all of them.
        participation: the share of them in a cohort.
        rounds: of the run.
        seed: of the run.
        diary: the write-ahead ledger.
    """

    settings: Privacy
    clients: tuple[Client, ...]
    participation: float
    rounds: int
    seed: int
    diary: Path

    @property
    def noise_multiplier(self) -> float:
        """z, as given, or the smallest that keeps to the budget until the last round."""
        raise NotImplementedError

    @property
    def at_the_end(self) -> float:
        """Epsilon of a run without any repeated round."""
        raise NotImplementedError

    def members(self, cohort: Sequence[Client]) -> dict[str, tuple[float, int]]:
        """Sampling probability and number of releases of a round, by the client whose they are."""
        raise NotImplementedError

    def spent(self, further: Mapping[str, tuple[float, int]] | None = None) -> float:
        """Epsilon of the client that has spent most, with ``further`` releases at today's noise."""
        found = ledger.by_member(ledger.read(self.diary))
        for id, (q, count) in (further or {}).items():
            found.setdefault(id, []).append(Release(self.noise_multiplier, q, count))
        return max((accountant.epsilon(of, self.settings.delta) for of in _largest(found)), default=0.0)

    def affords(self, clients: Sequence[Client], rnd: Round) -> bool:
        if self.settings.epsilon is None:
            return True
        return self.spent(self.members(self._next(clients, rnd))) <= self.settings.epsilon * (1 + 1e-6)

    def _next(self, clients: Sequence[Client], rnd: Round) -> Sequence[Client]:
        return self.cohort(clients, self.participation, rnd)

    def write(self, cohort: Sequence[Client], rnd: Round) -> None:
        """Counts a release before it is made."""
        ledger.append(
            self.diary,
            {
                "round": rnd.index,
                "attempt": rnd.attempt,
                "unit": self.settings.unit,
                "noise_multiplier": self.noise_multiplier,
                "clip": self.settings.clip,
                "members": {id: list(of) for id, of in self.members(cohort).items()},
            },
        )

    def account(self) -> dict[str, Any]:
        """The record's part on privacy."""
        lines, settings = ledger.read(self.diary), self.settings
        found = ledger.by_member(lines)
        return {
            "unit": settings.unit,
            "epsilon": finite(self.spent()),
            "delta": settings.delta,
            "noise_multiplier": self.noise_multiplier,
            "clip": settings.clip,
            "noise": settings.noise,
            "k": max((sum(release.count for release in of) for of in found.values()), default=0),
            "releases": len(lines),
        }


def finite(epsilon: float) -> float | None:
    """None for infinity, which JSON has no word for."""
    return epsilon if math.isfinite(epsilon) else None


def _largest(found: Mapping[str, list[Release]]) -> list[list[Release]]:
    """Of all members' releases those that no other's contain: epsilon grows with every release and with q."""
    totals: dict[tuple[tuple[float, float], ...], dict[tuple[float, float], int]] = {}
    for of in found.values():
        counts: dict[tuple[float, float], int] = {}
        for release in of:
            key = (release.noise_multiplier, release.sampling_probability)
            counts[key] = counts.get(key, 0) + release.count
        kinds = tuple(sorted(counts))
        best = totals.setdefault(kinds, counts)
        if all(counts[kind] >= best[kind] for kind in kinds):
            totals[kinds] = counts
        elif not all(counts[kind] <= best[kind] for kind in kinds):
            totals[kinds] = {kind: max(counts[kind], best[kind]) for kind in kinds}  # above both
    alone = {kinds[0]: counts[kinds[0]] for kinds, counts in totals.items() if len(kinds) == 1}
    covered = {
        (z, q)
        for (z, q), count in alone.items()
        if any(other != (z, q) and other[0] <= z and other[1] >= q and most >= count for other, most in alone.items())
    }
    return [
        [Release(z, q, count) for (z, q), count in counts.items()]
        for kinds, counts in totals.items()
        if not (len(kinds) == 1 and kinds[0] in covered)
    ]


@dataclass(frozen=True)
class ClientGuarantee(Spending):
    """Central differential privacy of whole clients, see ``mechanism``.

    A public cohort is no secret, so nothing is gained from sampling: a client's epsilon is that of the rounds it took
    part in, under zero-out adjacency. A secret one is a Poisson sample, with amplification, under add/remove adjacency.
    """

    def least(self, wanted: int) -> int:
        return 0  # an empty cohort is a round of noise

    @property
    def noise_multiplier(self) -> float:
        settings = self.settings
        if settings.noise_multiplier is not None:
            return settings.noise_multiplier
        assert settings.epsilon is not None
        return accountant.noise_multiplier(settings.epsilon, settings.delta, *self._schedule)

    @property
    def at_the_end(self) -> float:
        q, count = self._schedule
        return accountant.epsilon([Release(self.noise_multiplier, q, count)], self.settings.delta)

    @property
    def _schedule(self) -> tuple[float, int]:
        """q and the number of releases of the client that takes part most often."""
        if self.settings.cohort == "secret":
            return self.participation, self.rounds
        sampler = cohorts.uniform if self.settings.sampler == "uniform" else cohorts.round_robin
        return 1.0, cohorts.largest(sampler, self.clients, self.participation, self.seed, self.rounds)

    def cohort(self, clients: Sequence[Client], participation: float, rnd: Round) -> list[Client]:
        if self.settings.cohort == "secret":
            return cohorts.poisson(clients, participation, rnd)
        sampler = cohorts.uniform if self.settings.sampler == "uniform" else cohorts.round_robin
        return sampler(clients, participation, rnd)

    def members(self, cohort: Sequence[Client]) -> dict[str, tuple[float, int]]:
        if self.settings.cohort == "secret":
            return {mechanism.EVERYBODY: (self.participation, 1)}
        return {client.id: (1.0, 1) for client in cohort}

    def released(
        self, rule: Algorithm, state: Tensors, clients: Sequence[Client], replies: Sequence[Reply], rnd: Round
    ) -> list[Reply]:
        settings = self.settings
        self.write(self._next(clients, rnd), rnd)
        begun = mechanism.start(rule, state, clients, rnd)
        reply = mechanism.released(
            begun,
            mechanism.summed(rule, begun, replies, settings.clip),
            clip=settings.clip,
            noise_multiplier=self.noise_multiplier,
            members=self.expected_cohort,
            noise=noise.from_system if settings.noise == "os" else noise.seeded(rnd.rng("noise")),
        )
        return [reply]

    @property
    def expected_cohort(self) -> float:
        """q N: the fixed number that a sum is divided by."""
        if self.settings.cohort == "secret":
            return self.participation * len(self.clients)
        return float(cohorts.size(self.clients, self.participation))

    def on_client(self, worker: ClientWorker) -> ClientWorker:
        return BOnly(worker)

    def price(self, rule: Algorithm, state: Tensors, clients: Sequence[Client], rnd: Round) -> list[str]:
        """The noise in a round beside the clip: what all clients together could move."""
        D = mechanism.numbers(mechanism.start(rule, state, clients, rnd))
        ratio = self.noise_multiplier * math.sqrt(D) / self.expected_cohort
        told = f"Noise in a round: {D:,} numbers, together {ratio:.3g} times the clip."
        if ratio > USELESS:
            needed = math.ceil(self.noise_multiplier * math.sqrt(D))
            told += (
                f" That is more than {self.expected_cohort:g} clients a round can outweigh: about {needed:,} would be "
                "needed. Take more clients, a smaller rank and fewer worker.targets, or privacy.unit=example."
            )
        return [told]

    def told(self, record: Mapping[str, Any], replies: Sequence[Reply], rnd: Round) -> dict[str, Any]:
        """The released reply's own numbers; of clients nothing, and bytes as planned, of the largest rank."""
        (reply,) = replies
        return {
            "round": record["round"],
            "train_loss": None,
            "weights": {},
            "truncation_error": {},
            "bytes_down": round(serialization.size(reply.sent) * self.expected_cohort),
            "bytes_up": round(serialization.size(reply.returned) * self.expected_cohort),
            "flops": None,
            "seconds": None,
            "clients": {},
            "refused": {},
            "eval": {},
            "suspect": {},
            "robust": {},
            "repeated": [],
            "bytes_wasted": {"down": 0, "up": 0},
            "telemetry": dict(record["telemetry"]),
            "privacy": self.account(),
        }

    def partition(self, partition: Mapping[str, Any]) -> dict[str, Any]:
        """Clients and their ranks, which the mechanism takes for known; no rows and no labels."""
        return {
            "kind": partition["kind"],
            "clients": {client.id: {"rank": client.rank} for client in self.clients},
        }

    @property
    def lines(self) -> list[str]:
        settings = self.settings
        if settings.cohort == "secret":
            who = f"secret cohorts, each client by a coin of {self.participation:g} a round"
        else:
            who = f"public cohorts, no client in more than {self._schedule[1]} rounds"
        told = [
            f"Privacy (client): epsilon {self.at_the_end:.3g} at delta {settings.delta:g} after round {self.rounds}; "
            f"noise multiplier {self.noise_multiplier:g}, clip {settings.clip:g}, {who}.",
            "Clients train B alone, their steps are clipped and weigh the same: the rule is not its paper's.",
            "Protects a client's participation and all of its rows against other clients and readers of the adapter.",
            "Does not protect: against the server, which sees every upload; facts that hold for many clients; a "
            "client's own model on its own machine; settings that were chosen by looking at private runs"
            + ("; who took part." if settings.cohort == "public" else "."),
        ]
        return told + unkept(settings)


def unkept(settings: Privacy) -> list[str]:
    """The warning where noise can be drawn again."""
    if settings.noise == "os":
        return []
    return ["No guarantee: privacy.noise=seeded, so whoever has the recipe can draw the noise again and subtract it."]


@dataclass(frozen=True)
class ExampleGuarantee(Spending):
    """Differential privacy of one row, made in the client by DP-SGD: uploads are post-processing of it.

    Args:
        batch_size: rows that a step is expected to draw.
        steps: of a round.
    """

    batch_size: int = 1
    steps: int = 1

    @property
    def noise_multiplier(self) -> float:
        settings = self.settings
        if settings.noise_multiplier is not None:
            return settings.noise_multiplier
        assert settings.epsilon is not None
        return accountant.noise_multiplier(settings.epsilon, settings.delta, *self._schedule)

    @property
    def at_the_end(self) -> float:
        q, count = self._schedule
        return accountant.epsilon([Release(self.noise_multiplier, q, count)], self.settings.delta)

    @property
    def _schedule(self) -> tuple[float, int]:
        """q of the smallest client, and its steps where it takes part as often as anybody."""
        smallest = min(client.num_samples for client in self.clients)
        most = cohorts.largest(cohorts.uniform, self.clients, self.participation, self.seed, self.rounds)
        return min(1.0, self.batch_size / smallest), self.steps * most

    def members(self, cohort: Sequence[Client]) -> dict[str, tuple[float, int]]:
        return {client.id: (min(1.0, self.batch_size / client.num_samples), self.steps) for client in cohort}

    def begins(self, cohort: Sequence[Client], rnd: Round) -> None:
        self.write(cohort, rnd)

    def told(self, record: Mapping[str, Any], replies: Sequence[Reply], rnd: Round) -> dict[str, Any]:
        """Without what clients measure on their own rows, which has no noise."""
        kept = ("rank", "rows", "steps", "bytes_down", "bytes_up", "digest")
        clients = {id: {key: value for key, value in of.items() if key in kept} for id, of in record["clients"].items()}
        return {**record, "train_loss": None, "flops": None, "clients": clients, "privacy": self.account()}

    @property
    def lines(self) -> list[str]:
        settings = self.settings
        told = [
            f"Privacy (example): epsilon {self.at_the_end:.3g} at delta {settings.delta:g} after round {self.rounds}, "
            f"of the client with the fewest rows; noise multiplier {self.noise_multiplier:g}, clip {settings.clip:g} "
            f"of a row's gradient, Poisson batches of {self.batch_size} expected rows.",
            "Protects one row of a client, also against the server.",
            "Does not protect: a text that stands in several rows, or a person with rows at several clients (epsilons "
            "add up); a client as a whole; how many rows it has; settings that were chosen by looking at private runs.",
        ]
        return told + unkept(settings)


def guarantee(
    settings: Privacy,
    clients: Sequence[Client],
    *,
    participation: float,
    rounds: int,
    seed: int,
    folder: Path,
    batch_size: int = 1,
    steps: int | None = None,
) -> Guarantee:
    """What a run with these settings does.

    Raises:
        FedError: a delta by which a member could be published whole, a batch larger than a client's rows.
    """
    if settings.unit == "none":
        return Guarantee()
    shared = (settings, tuple(clients), participation, rounds, seed, folder / ledger.NAME)
    if settings.unit == "client":
        _check_delta(settings, len(clients), "clients")
        return ClientGuarantee(*shared)
    smallest = min(clients, key=lambda client: client.num_samples)
    _check_delta(settings, smallest.num_samples, f"rows of client {smallest.id}")
    if batch_size > smallest.num_samples:
        raise FedError(
            f"worker.batch_size={batch_size}, and client {smallest.id} has {smallest.num_samples} rows, from which a "
            "step of privacy.unit=example draws a part: give a smaller batch."
        )
    return ExampleGuarantee(*shared, batch_size=batch_size, steps=steps or 1)


def _check_delta(settings: Privacy, members: int, what: str) -> None:
    if settings.delta * members >= 1:
        raise FedError(
            f"privacy.delta={settings.delta:g}, and there are {members} {what}: a delta of 1/{members} allows one of "
            f"them to be published whole. Give one well below, such as {0.1 / members:.0e}."
        )
