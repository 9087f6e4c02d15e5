"""The federated loop, once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedllm import ledger
from fedllm.admission import admit
from fedllm.core import Algorithm, Client, Failed, FedError, Fleet, Job, Reply, Round, Tensors, Worker
from fedllm.progress import Display


@dataclass(frozen=True)
class Outcome:
    """Everything that a finished round leaves behind; ``state`` and ``memories`` are all that the next one needs."""

    round: Round
    state: Tensors
    memories: Mapping[str, Tensors]
    replies: Sequence[Reply]
    record: dict[str, Any]


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
) -> Iterator[Outcome]:
    """Yields the outcome of rounds ``first`` to ``rounds``. Resuming is calling it with what the last outcome held."""
    for index in range(first, rounds + 1):
        started = time.perf_counter()
        rnd = Round(index, seed, rounds=rounds)
        cohort = sample(clients, participation, rnd)
        display.round(index, [(client.id, client.rank, worker.of(client).steps) for client in cohort])
        jobs = [Job(c, ledger.canonical(algorithm.download(state, c, rnd)), memories.get(c.id, {})) for c in cohort]
        finished = list(fleet.run(algorithm, worker, jobs, rnd))
        failed = {done.client.id: done.reason for done, _ in finished if isinstance(done, Failed)}
        replies, refused = admit([done for done, _ in finished if isinstance(done, Reply)], algorithm.expected)
        refused = failed | refused
        if not replies:
            reasons = "; ".join(f"{id}: {reason}" for id, reason in refused.items())
            raise FedError(f"round {index}: no update of the cohort can be used, so there is nothing to average. {reasons}")
        record = _record(algorithm, state, rnd, replies, refused)
        state = ledger.canonical(algorithm.aggregate(state, replies, rnd))
        memories = {**memories, **{reply.client.id: ledger.canonical(memory) for reply, memory in finished if memory}}
        record["seconds"] = time.perf_counter() - started
        yield Outcome(rnd, state, memories, replies, record)


def sample(clients: Sequence[Client], participation: float, rnd: Round) -> list[Client]:
    """The round's cohort: ``int(participation * N)`` clients, one at least, uniformly without replacement."""
    size = max(1, int(participation * len(clients) + 1e-9))  # 0.3 * 10 is 2.9999999999999996 in some orders
    if size == len(clients):
        return list(clients)
    chosen = torch.randperm(len(clients), generator=rnd.rng("cohort"))[:size].sort().values
    return [clients[i] for i in chosen.tolist()]


def own_scores(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``own_...``: what clients measured of their personal models, each in its last round; the mean over all met so far."""
    last: dict[str, dict[str, float]] = {}
    for record in records:
        for id, client in record["clients"].items():
            own = {key: value for key, value in client.items() if key.startswith("own_")}
            last |= {id: own} if own else {}
    keys = next(iter(last.values()), {})
    return {key: sum(own[key] for own in last.values()) / len(last) for key in keys}


def _record(
    algorithm: Algorithm, state: Tensors, rnd: Round, replies: Sequence[Reply], refused: Mapping[str, str]
) -> dict[str, Any]:
    """The round's line in ``rounds.jsonl``; without its seconds and scores, which are not known yet."""
    rows = sum(reply.client.num_samples for reply in replies)
    per_client = {
        reply.client.id: {
            "rank": reply.client.rank,
            "rows": reply.client.num_samples,
            **reply.metrics,
            "bytes_down": ledger.size(reply.sent),
            "bytes_up": ledger.size(reply.returned),
        }
        for reply in replies
    }
    return {
        "round": rnd.index,
        "train_loss": sum(r.metrics.get("train_loss", 0.0) * r.client.num_samples for r in replies) / rows,
        "weights": algorithm.shares(state, replies),
        "truncation_error": {reply.client.id: algorithm.truncated(state, reply.client) for reply in replies},
        "bytes_down": sum(client["bytes_down"] for client in per_client.values()),
        "bytes_up": sum(client["bytes_up"] for client in per_client.values()),
        "seconds": 0.0,
        "clients": per_client,
        "refused": dict(refused),
        "eval": {},
    }
