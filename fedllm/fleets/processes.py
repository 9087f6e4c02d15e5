"""The processes of a launch, and the bytes that go between them.

They talk over a gloo group of their own, which is not torch's default group, and the launcher's variables are hidden
meanwhile: ``transformers`` would build its state from them and wrap each model in DDP across different clients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from fedllm.errors import FedError
from fedllm.wire.messages import pack

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
        launched: the launcher's variables, hidden from the libraries.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    group: Any = None
    launched: Mapping[str, str] = field(default_factory=dict)

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

    def tell(self, note: Mapping[str, Any]) -> None:
        """One note without tensors to every other process."""
        self.share(pack(note, {}))

    def share(self, message: bytes) -> None:
        """The same message to every other process."""
        for rank in range(1, self.size):
            self.send(message, rank)

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
                f"{name}={value}: this launch would spread the model over its processes for good, and adapters of "
                "another rank are hung into it for every client. Launch with a config without FSDP, DeepSpeed or "
                "Megatron; a model too large for one device trains with run.parallel=fsdp, or quantised to 4 bits."
            )
    hidden = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    rank, size = int(hidden.get("RANK", 0)), int(hidden.get("WORLD_SIZE", 1))
    group = _group(rank, size) if size > 1 else None
    here = Processes(rank, size, int(hidden.get("LOCAL_WORLD_SIZE", 1)), group, hidden)
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
