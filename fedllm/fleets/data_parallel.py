"""All processes of a launch train one client at a time: for a model that needs them all.

Each has a copy of the frozen base (``ddp``) or a shard of it (``fsdp``), takes its part of every step's rows, and
averages the adapter's gradients with the others. Rank 0 runs the loop; whatever it asks of its worker, the others do in
the same breath, so the algorithm runs in one process only.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.core import Algorithm, Client, Display, Fleet, Round, Tensors, Worker
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


def lead(processes: Processes, worker: Any, display: Display, *, tolerant: bool = True) -> tuple[Worker, Fleet]:
    """Rank 0's worker, whose work all processes share, and the fleet of one that hands clients to it.

    Args:
        tolerant: only of a single process: where one of several raises, the others wait for it, so the run ends.
    """
    if processes.size == 1:
        return worker, Local(display, tolerant)
    return Led(processes, worker), Local(display, tolerant=False)


def serve(processes: Processes, make: Callable[[], tuple[Algorithm, Any]]) -> None:
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
class Led:
    """Rank 0's worker: every call goes to the other processes first."""

    processes: Processes
    worker: Any

    def of(self, client: Client) -> LedSeat:
        """This worker, standing for ``client``."""
        return LedSeat(self.processes, self.worker.of(client), client)

    def evaluate(self, update: Tensors) -> Any:
        """The worker's own; a sharded model needs all processes to compute anything."""
        self.processes.share(pack({"do": "evaluate"}, {"update": update}))
        return self.worker.evaluate(update)


@dataclass(frozen=True)
class LedSeat:
    """Rank 0's worker, standing for one client."""

    processes: Processes
    seat: Any
    client: Client

    @property
    def steps(self) -> int:
        """Optimizer steps in a round."""
        return self.seat.steps

    def train(
        self,
        adapter: Tensors,
        memory: Tensors,
        rnd: Round,
        frozen: Tensors | None = None,
        nested: Tensors | None = None,
        part: Sequence[float] = (0.0, 1.0),
        factors: str = "BA",
    ) -> Any:
        """See ``fedllm.workers.sft.Seat.train``."""
        groups = {"adapter": adapter, "memory": memory, "frozen": frozen or {}, "nested": nested or {}}
        order = {"client": dataclasses.asdict(self.client), "round": dataclasses.asdict(rnd)}
        self.processes.share(pack({"do": "train", "part": part, "factors": factors, **order}, groups))
        return self.seat.train(**groups, rnd=rnd, part=part, factors=factors)

    def score(self, update: Tensors) -> dict[str, float]:
        """Rank 0's own, which asks nothing of the model."""
        return self.seat.score(update)


def _train(worker: Any, order: Mapping[str, Any], groups: Mapping[str, Tensors]) -> None:
    seat = worker.of(Client(**order["client"]))
    seat.train(**groups, rnd=Round(**order["round"]), part=order["part"], factors=order["factors"])


def _evaluate(worker: Any, order: Mapping[str, Any], groups: Mapping[str, Tensors]) -> None:
    worker.evaluate(groups["update"])


FOLLOWED = {"train": _train, "evaluate": _evaluate, "stop": lambda worker, order, groups: None}
"""What rank 0 can ask for."""
