"""Clients spread over the processes of a launch; rank 0 runs the loop, the others train what they are sent.

Each process trains its clients alone, on a device of its own. What decides a client's result is its payload, its memory
and the round's generators, so the number of processes changes nothing but the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from fedllm.core import Algorithm, Client, ClientResult, Display, Failed, Fleet, Job, Reply, Round, Worker
from fedllm.errors import FedError
from fedllm.fleets.interrupt import once
from fedllm.fleets.local import Local
from fedllm.fleets.processes import Gone, Processes
from fedllm.fleets.train_client import attempt
from fedllm.wire.messages import pack, unpack


def ready(processes: Processes, recipe: Any) -> AbstractContextManager[None]:
    """Nothing has to be: the libraries in each process know of no other."""
    return nullcontext()


def lead(processes: Processes, worker: Worker, display: Display, *, tolerant: bool = True) -> tuple[Worker, Fleet]:
    """Rank 0's worker and the fleet of all processes; see ``attempt`` for ``tolerant``."""
    return worker, Local(display, tolerant) if processes.size == 1 else Accelerate(processes, display, tolerant)


@dataclass(frozen=True)
class Accelerate:
    """The fleet of all processes of a launch.

    Args:
        processes: rank 0's view of them.
        display: shows this process's clients as they train, the others' as they arrive.
        tolerant: a client whose training raises fails alone; see ``attempt``.
    """

    processes: Processes
    display: Display
    tolerant: bool = True

    def run(self, algorithm: Algorithm, worker: Worker, jobs: Sequence[Job], rnd: Round) -> Iterator[ClientResult]:
        shares = spread([cost(worker, job.client) for job in jobs], self.processes.size)
        for rank, share in enumerate(shares[1:], start=1):
            order = {"do": "train", "round": dataclasses.asdict(rnd), "jobs": len(share), "tolerant": self.tolerant}
            self.processes.send(pack(order, {}), rank)
            for place in share:
                job = jobs[place]
                note = {"client": dataclasses.asdict(job.client)}
                self.processes.send(pack(note, {"sent": job.sent, "memory": job.memory}), rank)
        finished: dict[int, ClientResult] = {}
        own = Local(self.display, self.tolerant).run(algorithm, worker, [jobs[place] for place in shares[0]], rnd)
        for place, done in zip(shares[0], own, strict=True):
            finished[place] = done
        for rank, share in enumerate(shares[1:], start=1):
            for place in share:
                finished[place] = _taken(self.processes.receive(rank), jobs[place])
                self.display.client(jobs[place].client.id)
        for place in range(len(jobs)):
            yield finished.pop(place)


def _taken(message: bytes, job: Job) -> ClientResult:
    note, groups = unpack(message)
    if "stop" in note:
        raise FedError(f"client {job.client.id} ended the run: {note['stop']}")
    if "failed" in note:
        return ClientResult(Failed(job.client, note["failed"]), groups["memory"])
    reply = Reply(job.client, job.sent, groups["returned"], note["metrics"])
    return ClientResult(reply, groups["memory"])


def serve(processes: Processes, make: Callable[[], tuple[Algorithm, Worker]]) -> None:
    """What every rank but 0 does until rank 0 leaves, or is gone: it says itself why.

    Args:
        make: the algorithm and the worker; called once rank 0 has found the recipe sound, never where it has not.
    """
    with suppress(Gone), once():  # Ctrl-C is rank 0's to answer
        orders = iter(lambda: unpack(processes.receive(0))[0], {"do": "stop"})
        if next(orders, None) is None:
            return
        algorithm, worker = make()
        for order in orders:
            jobs = [_job(processes.receive(0)) for _ in range(order["jobs"])]
            rnd = Round(**order["round"])
            for answer in [_answer(algorithm, worker, job, rnd, order["tolerant"]) for job in jobs]:
                processes.send(answer, 0)  # after the last job: rank 0 listens once its own are done


def _job(message: bytes) -> Job:
    note, groups = unpack(message)
    return Job(Client(**note["client"]), groups["sent"], groups["memory"])


def _answer(algorithm: Algorithm, worker: Worker, job: Job, rnd: Round, tolerant: bool) -> bytes:
    try:
        done, memory = attempt(algorithm, worker, job, rnd, tolerant=tolerant)
    except Exception as error:  # the recipe wants the run to end: rank 0 has to be told, it is waiting
        return pack({"stop": f"{type(error).__name__}: {error}"}, {})
    if isinstance(done, Failed):
        return pack({"failed": done.reason}, {"memory": memory})
    return pack({"metrics": dict(done.metrics)}, {"returned": done.returned, "memory": memory})


def cost(worker: Worker, client: Client) -> float:
    """What training a client takes, in steps without an adapter; a rank of 256 makes a step twice as long."""
    return worker.of(client).steps * (1 + client.rank / 256)


def spread(costs: Sequence[float], size: int) -> list[list[int]]:
    """Which jobs each of ``size`` processes gets: the longest job first, to whoever has the least (Graham, 1969).

    The slowest process takes at most 4/3 - 1/(3 size) times as long as in the best possible spread.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least = loads.index(min(loads))
        shares[least].append(place)
        loads[least] += costs[place]
    return shares
