"""Clients spread over the processes of a launch; rank 0 runs the loop, the others train what they are sent.

Each process trains its clients alone, on a device of its own. What decides a client's result is its payload, its memory
and the round's generators, so the number of processes changes nothing but the time.

The processes talk over a gloo group of their own, which is not torch's default group, and the launcher's variables are
hidden meanwhile: ``transformers`` would build its state from them and wrap each model in DDP across different clients.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from fedllm.core import Algorithm, Client, Failed, FedError, Job, Reply, Round, Tensors, Worker
from fedllm.fleets.attempt import attempt
from fedllm.fleets.local import Local
from fedllm.interrupt import once
from fedllm.payload import pack, unpack
from fedllm.progress import Display

SPREADING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")

PATIENCE = timedelta(days=7)
"""How long a process waits for another: a client may train for days. One that dies is noticed at once."""

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""What ``accelerate launch`` and ``torchrun`` tell a process about its place, and what makes libraries wrap models."""


class Gone(FedError):
    """Another process of the launch does not answer any more."""


@dataclass(frozen=True)
class Processes:
    """The processes of this launch, seen from one of them.

    Args:
        rank: of this one, from 0.
        size: how many there are.
        local_size: how many of them run on this machine.
        group: a gloo process group over all of them; ``None`` where there is one.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    group: Any = None

    def send(self, message: bytes, to: int) -> None:
        """Blocks until the other process has taken it."""
        body = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        self._wait(to, lambda: self.group.send([torch.tensor([len(body)])], to, 0))
        self._wait(to, lambda: self.group.send([body], to, 0))

    def receive(self, frm: int) -> bytes:
        """Blocks until it is there."""
        length = torch.zeros(1, dtype=torch.int64)
        self._wait(frm, lambda: self.group.recv([length], frm, 0))
        body = torch.empty(int(length), dtype=torch.uint8)
        self._wait(frm, lambda: self.group.recv([body], frm, 0))
        return body.numpy().tobytes()

    def fleet(self, display: Display, *, tolerant: bool = True) -> Local | Accelerate:
        """The fleet of all of them; rank 0 asks for it."""
        return Local(display, tolerant) if self.size == 1 else Accelerate(self, display, tolerant)

    def tell(self, note: Mapping[str, Any]) -> None:
        """One note without tensors to every other process."""
        for rank in range(1, self.size):
            self.send(pack(note, {}), rank)

    def _wait(self, other: int, transfer: Callable[[], Any]) -> None:
        try:
            transfer().wait()
        except RuntimeError as error:
            raise Gone(
                f"process {other} of {self.size} is gone ({str(error).splitlines()[0]}). Its own output says why. "
                "The last finished round is kept: the same command with run.resume=true goes on from there."
            ) from error


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that a launcher started together with this one, or this one alone.

    For as long as the context lasts the launcher's variables are hidden, and this process sees one GPU at most: its
    own. When rank 0 leaves it, the others' ``serve`` ends.

    Raises:
        FedError: where the launch is configured to spread one model over its processes.
    """
    for name, value in os.environ.items():
        if name in SPREADING and value.lower() in {"1", "true", "yes"}:
            raise FedError(
                f"{name}={value}: this launch spreads one model over its processes, and here each of them trains whole "
                "clients of its own. Launch with a config without FSDP, DeepSpeed or Megatron; a model too large "
                "for one device trains with model.quantization=4bit."
            )
    hidden = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    rank, size = int(hidden.get("RANK", 0)), int(hidden.get("WORLD_SIZE", 1))
    here = Processes(rank, size, int(hidden.get("LOCAL_WORLD_SIZE", 1)), _group(rank, size) if size > 1 else None)
    _keep_one_gpu(int(hidden.get("LOCAL_RANK", 0)))
    for name in hidden:
        del os.environ[name]
    try:
        yield here
    finally:
        os.environ.update(hidden)
    if rank == 0:  # after an error they may be sending: nobody would take the word, and the closed line says it as well
        here.tell({"do": "stop"})


def _group(rank: int, size: int) -> Any:
    store, rank, size = next(torch.distributed.rendezvous("env://", rank, size, timeout=timedelta(minutes=10)))
    return torch.distributed.ProcessGroupGloo(torch.distributed.PrefixStore("fedllm", store), rank, size, PATIENCE)


def _keep_one_gpu(local_rank: int) -> None:
    """Before CUDA starts. With several in sight and no launcher, ``Trainer`` would take them all for one client."""
    every = ",".join(str(i) for i in range(torch.cuda.device_count()))
    devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",") if device]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank % len(devices)]


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

    def run(
        self, algorithm: Algorithm, worker: Worker, jobs: Sequence[Job], rnd: Round
    ) -> Iterator[tuple[Reply | Failed, Tensors]]:
        shares = spread([cost(worker, job.client) for job in jobs], self.processes.size)
        for rank, share in enumerate(shares[1:], start=1):
            order = {"do": "train", "round": dataclasses.asdict(rnd), "jobs": len(share), "tolerant": self.tolerant}
            self.processes.send(pack(order, {}), rank)
            for place in share:
                job = jobs[place]
                note = {"client": dataclasses.asdict(job.client)}
                self.processes.send(pack(note, {"sent": job.sent, "memory": job.memory}), rank)
        finished: dict[int, tuple[Reply | Failed, Tensors]] = {}
        own = Local(self.display, self.tolerant).run(algorithm, worker, [jobs[place] for place in shares[0]], rnd)
        for place, done in zip(shares[0], own, strict=True):
            finished[place] = done
        for rank, share in enumerate(shares[1:], start=1):
            for place in share:
                finished[place] = _taken(self.processes.receive(rank), jobs[place])
                self.display.client(jobs[place].client.id)
        for place in range(len(jobs)):
            yield finished.pop(place)


def _taken(message: bytes, job: Job) -> tuple[Reply | Failed, Tensors]:
    note, groups = unpack(message)
    if "stop" in note:
        raise FedError(f"client {job.client.id} ended the run: {note['stop']}")
    if "failed" in note:
        return Failed(job.client, note["failed"]), groups["memory"]
    return Reply(job.client, job.sent, groups["returned"], note["metrics"]), groups["memory"]


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
