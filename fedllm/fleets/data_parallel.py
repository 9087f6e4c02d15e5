"""All processes of a launch train one client at a time: for a model that needs them all.

Each has a copy of the frozen base (``ddp``) or a shard of it (``fsdp``), takes its part of every step's rows, and
averages the adapter's gradients with the others. Rank 0 runs the loop; whatever it asks of its worker, the others do in
the same breath, so the algorithm runs in one process only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedllm.core import (
    Algorithm,
    Client,
    ClientWorker,
    Display,
    Fleet,
    LocalResult,
    LocalTraining,
    Round,
    Score,
    Tensors,
    Worker,
)
from fedllm.fleets.interrupt import once
from fedllm.fleets.local import Local
from fedllm.fleets.processes import Gone, Processes
from fedllm.wire.messages import pack, unpack


@contextmanager
def ready(processes: Processes, recipe: Any) -> Iterator[None]:
    """Shows the libraries the launch again, each process with the one device that it sees, as torch's default group.

    Raises:
        FedError: where the processes cannot share a step's rows evenly.
    """
    if processes.size == 1:
        yield
        return
    if processes.rank == 0:  # which says it, and ends the launch
        recipe.worker.shared(processes.size)
    os.environ.update({**processes.launched, "LOCAL_RANK": "0"})  # ``joined`` puts all back
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def lead(processes: Processes, worker: Worker, display: Display, *, tolerant: bool = True) -> tuple[Worker, Fleet]:
    """Rank 0's worker, whose work all processes share, and the fleet of one that hands clients to it.

    Args:
        tolerant: only of a single process: where one of several raises, the others wait for it, so the run ends.
    """
    if processes.size == 1:
        return worker, Local(display, tolerant)
    return BroadcastWorker(processes, worker), Local(display, tolerant=False)


def serve(processes: Processes, make: Callable[[], tuple[Algorithm, Worker]]) -> None:
    """What every rank but 0 does until rank 0 leaves or is gone: what rank 0's worker is asked to do."""
    with suppress(Gone), once():
        order, groups = unpack(processes.receive(0))
        if order["do"] == "stop":
            return
        _, worker = make()
        while order["do"] != "stop":
            order, groups = unpack(processes.receive(0))
            FOLLOWED[order["do"]](worker, order, groups)


@dataclass(frozen=True)
class BroadcastWorker(Worker):
    """Rank 0's worker: every call goes to the other processes first."""

    processes: Processes
    worker: Worker

    def of(self, client: Client) -> BroadcastClient:
        """This worker, standing for ``client``."""
        return BroadcastClient(self.processes, self.worker.of(client), client)

    def evaluate(self, update: Tensors) -> Score:
        """The worker's own; a sharded model needs all processes to compute anything."""
        self.processes.share(pack({"do": "evaluate"}, {"update": update}))
        return self.worker.evaluate(update)


@dataclass(frozen=True)
class BroadcastClient(ClientWorker):
    """Rank 0's view of one client: what it is asked to train, the other processes train with it."""

    processes: Processes
    inner: ClientWorker
    client: Client

    @property
    def steps(self) -> int:
        return self.inner.steps

    def fit(self, request: LocalTraining) -> LocalResult:
        request.only(f"a client that {self.processes.size} processes train together", *SENT)
        self.processes.share(pack_training(self.client, request))
        return self.inner.fit(request)

    def score(
        self, weights: Tensors, alphas: Mapping[str, float] | None = None, forward: Callable[..., object] | None = None
    ) -> dict[str, float]:
        """Rank 0's own, which asks nothing of the model."""
        return self.inner.score(weights, alphas, forward)


SENT = ("frozen", "nested", "part", "factors")
"""The options of a request that travel; a function cannot."""


def pack_training(client: Client, request: LocalTraining) -> bytes:
    note = {"do": "train", "client": asdict(client), "round": asdict(request.rnd)}
    options = {"part": request.part, "factors": request.factors}
    groups = {"weights": request.weights, "memory": request.memory}
    return pack(note | options, groups | {"frozen": request.frozen, "nested": request.nested})


def _train(worker: Worker, order: Mapping[str, Any], groups: Mapping[str, Tensors]) -> None:
    first, last = order["part"]
    options: dict[str, Any] = {"part": (first, last), "factors": order["factors"], **groups}
    worker.of(Client(**order["client"])).train(rnd=Round(**order["round"]), **options)


def _evaluate(worker: Worker, order: Mapping[str, Any], groups: Mapping[str, Tensors]) -> None:
    worker.evaluate(groups["update"])


FOLLOWED = {"train": _train, "evaluate": _evaluate, "stop": lambda worker, order, groups: None}
"""What rank 0 can ask for."""
