"""The federated loop, once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedllm.core import (
    Algorithm,
    Client,
    ClientResult,
    Display,
    Failed,
    Fleet,
    Job,
    Reply,
    Round,
    StopAsked,
    Tensors,
    Worker,
)
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.privacy.guarantee import Guarantee
from fedllm.server import telemetry
from fedllm.server.admission import admit, plain, suspects, unreadable, without_graph
from fedllm.server.robust import Trust
from fedllm.wire import serialization as ledger


@dataclass(frozen=True)
class Policy:
    """What a round needs to count.

    Args:
        quorum: share of the cohort whose updates must be usable; one update at least.
        attempts: how often a round is tried, each time with another cohort, before the run ends.
        deadline: seconds after which a client's update is too late; ``None`` waits for everybody.
        norm_bound: see ``admit``.
        robust: the guard between admission and the average.
        privacy: what the round guarantees.
    """

    quorum: float = 0.0
    attempts: int = 3
    deadline: float | None = None
    norm_bound: float | None = None
    robust: Trust = Trust()
    privacy: Guarantee = Guarantee()

    def least(self, cohort: int) -> int:
        """Usable updates that a cohort of this size must give."""
        return self.privacy.least(max(1, self.robust.least, math.ceil(self.quorum * cohort - 1e-9)))


class Interrupted(FedError):
    """Somebody asked the run to stop. ``finished`` is what the clients of round ``rnd`` had done by then."""

    def __init__(self, rnd: Round, finished: Sequence[ClientResult]) -> None:
        super().__init__(
            f"stopped in round {rnd.index} with {len(finished)} clients done: run.resume=true goes on from there."
        )
        self.rnd, self.finished = rnd, finished


@dataclass(frozen=True)
class Outcome:
    """Everything that a finished round leaves behind; ``state`` and ``memories`` are all that the next one needs.

    Args:
        record: what anybody may know of it.
        private: all of it, for the server's operator.
    """

    round: Round
    state: Tensors
    memories: Mapping[str, Tensors]
    replies: Sequence[Reply]
    record: dict[str, Any]
    private: dict[str, Any]


def federate(
    algorithm: Algorithm,
    clients: Sequence[Client],
    worker: Worker,
    fleet: Fleet,
    display: Display,
    *,
    state: Tensors,
    memories: Mapping[str, Tensors],
    first: int,
    rounds: int,
    seed: int,
    participation: float = 1.0,
    policy: Policy = Policy(),
    records: Sequence[Mapping[str, Any]] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Yields the outcome of rounds ``first`` to ``rounds``. Resuming is calling it with what the last outcome held.

    It ends before a round that would pass the policy's privacy budget.

    Args:
        records: of the rounds before, to tell an update that came before.
        stop: asked after every client; where it says so, the loop ends in ``Interrupted``.
    """
    seen = {id: client["digest"] for record in records for id, client in record["clients"].items()}
    for index in range(first, rounds + 1):
        started = time.perf_counter()
        privacy = policy.privacy
        if not privacy.affords(clients, Round(index, seed, rounds=rounds)):
            return

        def play(rnd: Round, state: Tensors = state, memories: Mapping[str, Tensors] = memories) -> Played:
            cohort = policy.privacy.cohort(clients, participation, rnd)
            policy.privacy.begins(cohort, rnd)
            display.round(rnd.index, [(client.id, client.rank, worker.of(client).steps) for client in cohort])
            sent = {c.id: ledger.canonical(algorithm.download(state, c, rnd)) for c in cohort}
            jobs = [Job(client, sent[client.id], memories.get(client.id, {})) for client in cohort]
            finished: list[ClientResult] = []
            try:
                for done in fleet.run(algorithm, worker, jobs, rnd):
                    finished.append(done)
                    if stop():
                        raise Interrupted(rnd, finished)
            except StopAsked as asked:
                raise Interrupted(rnd, finished) from asked
            return Played(rnd, jobs, finished, *_usable(algorithm, jobs, finished, policy))

        played = _played(
            play, [Round(index, seed, rounds=rounds, attempt=k) for k in range(policy.attempts)], policy, stop
        )
        *short, good = played
        guarded, notes = policy.robust.guard(algorithm, good.replies)
        kept = privacy.released(algorithm, state, clients, guarded, good.rnd)
        record = _record(algorithm, state, good, kept)
        now = {id: client["digest"] for id, client in record["clients"].items()}
        record |= {
            "suspect": suspects(good.replies, algorithm.expected, seen, now, averaged_factors(algorithm)),
            "robust": notes,
            "repeated": [attempt.refused for attempt in short],
            "bytes_wasted": _wasted(played),
        }
        before, state = state, ledger.canonical(algorithm.aggregate(state, kept, good.rnd))
        _check(state, good.rnd)
        record["telemetry"] = telemetry.measure(algorithm, before, state, kept)
        usable = {reply.client.id for reply in good.replies}  # a refused client goes on from what it remembered before
        after = {done.client.id: memory for done, memory in good.finished if memory and done.client.id in usable}
        memories = {**memories, **{id: ledger.canonical(memory) for id, memory in after.items()}}
        seen |= now
        record["seconds"] = time.perf_counter() - started
        yield Outcome(good.rnd, state, memories, good.replies, privacy.told(record, kept, good.rnd), record)


@dataclass(frozen=True)
class Played:
    """One attempt at a round: what was sent, what came back, what of it may be averaged, and why the rest may not."""

    rnd: Round
    jobs: Sequence[Job]
    finished: Sequence[ClientResult]
    replies: Sequence[Reply]
    refused: Mapping[str, str]


def _played(
    play: Callable[[Round], Played], attempts: Sequence[Round], policy: Policy, stop: Callable[[], bool]
) -> list[Played]:
    """Attempts at a round, of which the last has its quorum.

    Raises:
        FedError: where none of them has.
    """
    played: list[Played] = []
    for rnd in attempts:
        if stop():
            raise Interrupted(rnd, [])
        played.append(play(rnd))
        if len(played[-1].replies) >= policy.least(len(played[-1].jobs)):
            return played
    last = played[-1]
    reasons = " ".join(f"{id}: {reason}" for id, reason in list(last.refused.items())[:5])
    raise FedError(
        f"round {last.rnd.index}: fewer than {policy.least(len(last.jobs))} usable updates in {len(played)} attempts. "
        f"The last time: {reasons} Round {last.rnd.index - 1} is kept, and run.resume=true goes on from there once the "
        "clients can. run.quorum is the share of a cohort that must answer, run.attempts how often a round is tried."
    )


def _usable(
    algorithm: Algorithm, jobs: Sequence[Job], finished: Sequence[ClientResult], policy: Policy
) -> tuple[list[Reply], dict[str, str]]:
    """The replies that may be averaged, and the others' ids with the reason.

    Who a client is, how many rows and which rank it has and what it was sent, the server knows from its own job.
    """
    jobs_of = {job.client.id: job for job in jobs}
    refused = {done.client.id: done.reason for done, _ in finished if isinstance(done, Failed)}
    in_time = []
    for reply in [done for done, _ in finished if isinstance(done, Reply)]:
        job = jobs_of.get(reply.client.id)
        if job is None:
            refused[str(reply.client.id)[:200]] = "Nobody of that id was sent anything in this round."
            continue
        reply = replace(reply, client=job.client, sent=job.sent, returned=without_graph(reply.returned))
        if reason := unreadable(reply.metrics):
            refused[reply.client.id] = reason
            continue
        seconds = reply.metrics.get("seconds", 0.0)
        if policy.deadline is not None and seconds > policy.deadline:
            refused[reply.client.id] = f"It took {seconds:.1f} s, and the deadline is {policy.deadline:g} s."
        else:
            in_time.append(reply)
    replies, unfit = admit(
        in_time, algorithm.expected, norm_bound=policy.norm_bound, factors=averaged_factors(algorithm)
    )
    return [plain(reply, algorithm.expected(reply)) for reply in replies], refused | unfit


def averaged_factors(algorithm: Algorithm) -> Callable[[Reply], Tensors] | None:
    """The products of a reply whose factors the rule averages one by one; ``None`` where it averages products."""
    return algorithm.trained if algorithm.averages_factors else None


def _wasted(played: Sequence[Played]) -> dict[str, int]:
    """Bytes down and up that served nothing: to and from refused clients, and all of an attempt without its quorum."""
    bytes = {"down": 0, "up": 0}
    for attempt in played:
        used = {reply.client.id for reply in attempt.replies} if attempt is played[-1] else set()
        bytes["down"] += sum(ledger.size(job.sent) for job in attempt.jobs if job.client.id not in used)
        back = [done for done, _ in attempt.finished if isinstance(done, Reply) and done.client.id not in used]
        bytes["up"] += sum(ledger.size(reply.returned) for reply in back if ledger.can_travel(reply.returned))
    return bytes


def _check(state: Tensors, rnd: Round) -> None:
    """Raises FedError where the state has become useless: the round is not saved, the one before it is kept."""
    for name, value in state.items():
        for tensor in (value.B, value.A) if isinstance(value, LowRank) else (value,):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise FedError(
                    f"round {rnd.index}: the aggregate of {name} is no longer finite, so the round does not count. "
                    "Bound what a client may send (admission.norm_bound, robust.name=clip) and continue with "
                    "run.resume=true."
                )


def own_scores(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``own_...``: clients' scores of their personal models, each in its last round; the mean over all met so far."""
    last: dict[str, dict[str, float]] = {}
    for record in records:
        for id, client in record["clients"].items():
            own = {key: value for key, value in client.items() if key.startswith("own_")}
            last |= {id: own} if own else {}
    keys = next(iter(last.values()), {})
    return {key: sum(own[key] for own in last.values()) / len(last) for key in keys}


def _record(algorithm: Algorithm, state: Tensors, played: Played, kept: Sequence[Reply]) -> dict[str, Any]:
    """The round's line in ``rounds.jsonl``; without its seconds and scores, which are not known yet."""
    rnd, replies = played.rnd, played.replies
    rows = sum(reply.client.num_samples for reply in replies)
    counted = [reply.metrics["flops"] for reply in replies if "flops" in reply.metrics]
    per_client = {
        reply.client.id: {
            "rank": reply.client.rank,
            "rows": reply.client.num_samples,
            **reply.metrics,
            "bytes_down": ledger.size(reply.sent),
            "bytes_up": ledger.size(reply.returned),
            "digest": ledger.digest(reply.returned),
        }
        for reply in replies
    }
    return {
        "round": rnd.index,
        "train_loss": sum(r.metrics.get("train_loss", 0.0) * r.client.num_samples for r in replies) / max(rows, 1),
        "weights": dict.fromkeys(per_client, 0.0) | algorithm.shares(state, kept),
        "truncation_error": {reply.client.id: algorithm.truncated(state, reply.client) for reply in replies},
        "bytes_down": sum(client["bytes_down"] for client in per_client.values()),
        "bytes_up": sum(client["bytes_up"] for client in per_client.values()),
        "flops": sum(counted) if len(counted) == len(replies) else None,
        "seconds": 0.0,
        "clients": per_client,
        "refused": dict(played.refused),
        "eval": {},
    }
