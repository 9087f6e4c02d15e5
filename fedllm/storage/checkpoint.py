"""A run's finished rounds on disk: written whole or not at all, checked when read, never unpickled."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedllm.core import Client, ClientResult, Failed, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.storage import files
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

MOST_CLIENTS = 1_000_000
"""Clients of one round; a manifest that claims more is none."""

_CLIENT, _ROUND = TypeAdapter(Client), TypeAdapter(Round)

NAME = re.compile(r"round_\d{1,9}(_\d{1,9})?")
"""A checkpoint's folder."""

DAMAGE = (
    *(FedError, OSError, ValueError, KeyError, TypeError, AttributeError),
    *(OverflowError, MemoryError, RecursionError, SafetensorError),
)
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
    """Writes ``folder/round_NNNN`` atomically, then removes those before the last ``KEEP``.

    A round that is written again, with the clients of the round after it, gets a name of its own, ``round_NNNN_2``: at
    no moment is there neither of the two.

    Raises:
        Unwritten: where the disk does not take it; what was there before is whole.
    """
    files.make_folder(folder)
    scratch = folder / ".writing"
    with files.writing(folder):
        try:
            _remove(scratch)  # of a process that was killed here
            scratch.mkdir()
            _fill(scratch, checkpoint)
            scratch.rename(_unused(folder, checkpoint.index))
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        files.sync(folder)
        found = _rounds(folder)
        kept = {_place(path)[0]: path for path in found}  # of each round the last that was written
        for old in found:
            if old not in list(kept.values())[-KEEP:]:
                shutil.rmtree(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _unused(folder: Path, index: int) -> Path:
    again = [_place(path)[1] for path in _rounds(folder) if _index(path) == index]
    return folder / (f"round_{index:04d}_{max(again) + 1}" if again else f"round_{index:04d}")


def _fill(scratch: Path, checkpoint: Checkpoint) -> None:
    """Puts the tensors and the manifest that vouches for them into ``scratch``, on disk when it returns."""
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
        files.sync(file)
    files.sync(scratch)


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


def check_state(checkpoint: Checkpoint, first: Tensors, where: Path) -> None:
    """Checks the state of a run that goes on against that of round 0; ranks and further names may have come since.

    Raises:
        FedError: a tensor of the model is missing, or has another dtype.
    """
    kinds = {name: _dtype(value) for name, value in checkpoint.state.items()}
    for name, value in first.items():
        if kinds.get(name) != _dtype(value):
            found = f"is {kinds[name]}" if name in kinds else "is missing"
            raise FedError(
                f"the checkpoint of round {checkpoint.index} in {where} is not of this model: {name} {found}, and "
                f"{_dtype(value)} is needed. Start anew with run.overwrite=true."
            )


def _dtype(value: Tensor | LowRank) -> torch.dtype:
    """Of a product, that of its factors: a rule may hold one as a dense matrix once that is smaller."""
    return value.B.dtype if isinstance(value, LowRank) else value.dtype


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
    found = [path for path in folder.glob("round_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((path for path in found if not path.is_symlink()), key=_place)


def _place(path: Path) -> tuple[int, int]:
    """The round, and the how-manieth time it was written."""
    index, _, again = path.name.removeprefix("round_").partition("_")
    return int(index), int(again or 1)


def _index(path: Path) -> int:
    return _place(path)[0]


def _read(path: Path) -> Checkpoint:
    manifest_file = path / "checkpoint.json"
    if manifest_file.lstat().st_size > LONGEST:
        raise ValueError(f"checkpoint.json has {manifest_file.lstat().st_size} bytes, more than any manifest")
    text = files.read_bytes(manifest_file, LONGEST).decode()
    own, _, body = text.partition("\n")
    if hashlib.sha256(body.removesuffix("\n").encode()).hexdigest() != own:
        raise ValueError("checkpoint.json is not what was written")
    manifest = json.loads(body)
    _well_formed(manifest, path)
    clients = manifest["clients"]
    plain = ["state.safetensors", *(f"memory_{number}.safetensors" for number in range(len(clients)))]
    packed = [f"finished_{number}" for number in range(manifest["finished"])]
    for name in [*plain, *packed]:  # names are ours, not the manifest's: nothing outside the folder is ever opened
        if _digest(path / name) != manifest["sha256"][name]:
            raise ValueError(f"{name} is not what was written")
    state, *memories = (unflatten(load_file(path / name)) for name in plain)
    return Checkpoint(
        int(manifest["round"]),
        state,
        dict(zip(clients, memories, strict=True)),
        manifest["records"],
        manifest["recipe"],
        None if manifest["interrupted"] is None else _ROUND.validate_python(manifest["interrupted"]),
        [_unpacked(path / name) for name in packed],
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
    if not 0 <= manifest["finished"] <= MOST_CLIENTS:
        raise ValueError(f"checkpoint.json: {manifest['finished']} clients have finished")
    if type(_at(manifest, "recipe", "run", "rounds")) is not int:
        raise ValueError("checkpoint.json: its recipe has no number of rounds")
    for number, record in enumerate(manifest["records"], start=1):
        _check_record(record, number)
    if len(manifest["records"]) != manifest["round"]:
        raise ValueError(f"checkpoint.json: {len(manifest['records'])} records of {manifest['round']} rounds")
    if len(manifest["sha256"]) != 1 + len(manifest["clients"]) + manifest["finished"]:
        raise ValueError("checkpoint.json: it does not vouch for as many files as there are")


def _at(value: Any, *path: str) -> Any:
    """The value at this place of nested mappings, or None where there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _check_record(record: Any, number: int) -> None:
    """Raises ValueError where this is not what a finished round leaves."""
    if not isinstance(record, dict) or record.get("round") != number or type(record["round"]) is not int:
        raise ValueError(f"checkpoint.json: record {number} is not that of round {number}")
    for key in ("clients", "weights", "refused", "eval"):
        if not isinstance(record.get(key), dict):
            raise ValueError(f"checkpoint.json: record {number} has no {key}")
    for id, client in record["clients"].items():
        if not isinstance(client, dict) or not isinstance(client.get("digest"), str):
            raise ValueError(f"checkpoint.json: record {number} has no digest of client {id[:80]!r}")
        if any(key.startswith("own_") and not _is_number(value) for key, value in client.items()):
            raise ValueError(f"checkpoint.json: a score of client {id[:80]!r} in record {number} is no number")
    if any(not _is_number(value) for value in record["eval"].values()):
        raise ValueError(f"checkpoint.json: a score in record {number} is no number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _packed(ended: Reply | Failed, memory: Tensors) -> bytes:
    note: dict[str, Any] = {"client": asdict(ended.client)}
    if isinstance(ended, Failed):
        return pack(note | {"failed": ended.reason}, {"memory": memory})
    return pack(note | {"metrics": dict(ended.metrics)}, {"returned": ended.returned, "memory": memory})


def _unpacked(file: Path) -> ClientResult:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as message:
        note, groups = unpack(message)  # mapped: the note is found wanting before the tensors are read
    client = _CLIENT.validate_python(note["client"])
    if "failed" in note:
        return ClientResult(Failed(client, str(note["failed"])), groups["memory"])
    if not isinstance(note["metrics"], dict):
        raise ValueError(f"{file.name}: its metrics are no object")
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


def _digest(file: Path) -> str:
    if not file.is_file() or file.is_symlink():  # a link to a device would never end
        raise ValueError(f"{file.name} is no file of its own")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
