"""A run's finished rounds on disk: written whole or not at all, checked when read, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedllm.core import Client, ClientResult, Failed, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.wire.messages import pack, unpack
from fedllm.wire.serialization import flatten, unflatten

KEEP = 2
"""Checkpoints on disk: the last, and the one before it in case the last is damaged."""


LONGEST = 1 << 30
"""Bytes of a manifest that are read: the records of a hundred clients over a hundred thousand rounds."""

FREE = {
    *(f"run.{key}" for key in ("rounds", "output", "tracker", "overwrite", "threads", "parallel")),
    *(f"run.{key}" for key in ("quorum", "attempts", "deadline", "on_client_error")),
    "admission",
    "robust",
    "hub",
}
"""What may change when a run goes on: how far, where, who watches, what mends a run that had to stop, what
becomes of the model afterwards."""

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)
"""What reading a file that is not what was written can raise."""


@dataclass(frozen=True)
class Checkpoint:
    """All that the round after ``index`` needs.

    Args:
        interrupted: the round, and the attempt at it, that was begun and stopped; ``None`` between rounds.
        finished: how the clients that were done by then ended, and their new memories. Replies come back without what
            was sent to them, which ``download`` makes again.
    """

    index: int
    state: Tensors
    memories: Mapping[str, Tensors]
    records: list[dict[str, Any]]
    page: Mapping[str, Any]
    interrupted: Round | None = None
    finished: Sequence[ClientResult] = ()


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes ``folder/round_NNNN`` atomically, then removes those before the last ``KEEP``."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".writing"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed here
    scratch.mkdir()
    save_file(_owned(flatten(checkpoint.state)), scratch / "state.safetensors")
    clients = sorted(checkpoint.memories)
    for number, client in enumerate(clients):
        save_file(_owned(flatten(checkpoint.memories[client])), scratch / f"memory_{number}.safetensors")
    for number, (ended, memory) in enumerate(checkpoint.finished):
        (scratch / f"finished_{number}").write_bytes(_packed(ended, memory))
    body = json.dumps(
        {
            "round": checkpoint.index,
            "recipe": checkpoint.page,
            "records": checkpoint.records,
            "clients": clients,
            "interrupted": None if checkpoint.interrupted is None else asdict(checkpoint.interrupted),
            "finished": len(checkpoint.finished),
            "sha256": {file.name: _digest(file) for file in sorted(scratch.iterdir())},
        }
    )
    own = hashlib.sha256(body.encode()).hexdigest()
    (scratch / "checkpoint.json").write_text(f"{own}\n{body}\n", encoding="utf-8")
    for file in scratch.iterdir():
        sync(file)
    sync(scratch)
    final = folder / f"round_{checkpoint.index:04d}"
    if final.exists():
        shutil.rmtree(final)
    scratch.rename(final)
    sync(folder)
    for old in _rounds(folder)[:-KEEP]:
        shutil.rmtree(old)


def load(folder: Path, page: Mapping[str, Any], *, until: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none.

    Args:
        until: take none of a later round, where there is an earlier one.

    Raises:
        FedError: where it belongs to another recipe (names the keys that differ), or all are damaged.
    """
    damaged = []
    found = _rounds(folder)
    for path in reversed([path for path in found if until is None or _index(path) <= until] or found):
        try:
            checkpoint = _read(path)
        except DAMAGE as error:
            damaged.append(f"{path.name}: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}")
            continue
        differing = list(differences(page, checkpoint.page))
        if differing:
            raise FedError(
                f"{folder} holds a run of another recipe: {'; '.join(differing)}. "
                "Resume with the recipe it was started with, or take another run.output."
            )
        return checkpoint
    if damaged:
        raise FedError(f"no checkpoint in {folder} is whole. {'; '.join(damaged)}. Start anew with run.overwrite=true.")
    return None


def _owned(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views become tensors of their own: safetensors refuses two names for one memory."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in flat.items():
        storage = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return owned


def _rounds(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("round_*") if re.fullmatch(r"round_\d+", path.name) and path.is_dir()]
    return sorted(found, key=_index)


def _index(path: Path) -> int:
    return int(path.name.removeprefix("round_"))


def _read(path: Path) -> Checkpoint:
    text = _bytes(path / "checkpoint.json", LONGEST).decode()
    own, _, body = text.partition("\n")
    if hashlib.sha256(body.removesuffix("\n").encode()).hexdigest() != own:
        raise ValueError("checkpoint.json is not what was written")
    manifest = json.loads(body)
    _well_formed(manifest, path)
    clients = manifest["clients"]
    files = ["state.safetensors", *(f"memory_{number}.safetensors" for number in range(len(clients)))]
    packed = [f"finished_{number}" for number in range(manifest["finished"])]
    for name in [*files, *packed]:  # names are ours, not the manifest's: nothing outside the folder is ever opened
        if _digest(path / name) != manifest["sha256"][name]:
            raise ValueError(f"{name} is not what was written")
    state, *memories = (unflatten(load_file(path / name)) for name in files)
    return Checkpoint(
        int(manifest["round"]),
        state,
        dict(zip(clients, memories, strict=True)),
        manifest["records"],
        manifest["recipe"],
        None if manifest["interrupted"] is None else Round(**manifest["interrupted"]),
        [_unpacked((path / name).read_bytes()) for name in packed],
    )


def _well_formed(manifest: Any, path: Path) -> None:
    """Raises ValueError where the manifest is none of ours, whoever vouches for it; before anything is made of it."""
    kinds = {"round": int, "recipe": dict, "records": list, "clients": list, "finished": int, "sha256": dict}
    for key, kind in kinds.items():
        if type(manifest[key]) is not kind:
            raise ValueError(f"checkpoint.json: {key} is no {kind.__name__}")
    if manifest["round"] != _index(path):
        raise ValueError(f"checkpoint.json is of round {manifest['round']}")
    if not all(isinstance(client, str) for client in manifest["clients"]):
        raise ValueError("checkpoint.json: a client is no text")
    if not all(isinstance(record, dict) for record in manifest["records"]):
        raise ValueError("checkpoint.json: a record is no object")
    if len(manifest["sha256"]) != 1 + len(manifest["clients"]) + manifest["finished"]:
        raise ValueError("checkpoint.json: it does not vouch for as many files as there are")


def _packed(ended: Reply | Failed, memory: Tensors) -> bytes:
    note: dict[str, Any] = {"client": asdict(ended.client)}
    if isinstance(ended, Failed):
        return pack(note | {"failed": ended.reason}, {"memory": memory})
    return pack(note | {"metrics": dict(ended.metrics)}, {"returned": ended.returned, "memory": memory})


def _unpacked(message: bytes) -> ClientResult:
    note, groups = unpack(message)
    client = Client(**note["client"])
    if "failed" in note:
        return ClientResult(Failed(client, note["failed"]), groups["memory"])
    return ClientResult(Reply(client, {}, groups["returned"], note["metrics"]), groups["memory"])


def differences(now: Any, then: Any, where: str = "") -> Iterator[str]:
    """Where two pages ask for another training, in words."""
    if where in FREE:
        return
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        for key in dict.fromkeys([*now, *then]):
            yield from differences(now.get(key), then.get(key), f"{where}.{key}" if where else key)
    elif now != then:
        yield f"{where} is {now!r} now and was {then!r}"


def _bytes(file: Path, most: int) -> bytes:
    if not file.is_file() or file.is_symlink():
        raise ValueError(f"{file.name} is no file of its own")
    if file.stat().st_size > most:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes, more than any manifest")
    return file.read_bytes()


def _digest(file: Path) -> str:
    if not file.is_file() or file.is_symlink():  # a link to a device would never end
        raise ValueError(f"{file.name} is no file of its own")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Has the file, or the folder's list of names, on disk when it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
