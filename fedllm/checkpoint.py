"""A run's finished rounds on disk: written whole or not at all, checked when read, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedllm.core import FedError, Tensors
from fedllm.ledger import flatten, unflatten

KEEP = 2
"""Checkpoints on disk: the last, and the one before it in case the last is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """All that the round after ``index`` needs."""

    index: int
    state: Tensors
    memories: Mapping[str, Tensors]
    records: list[dict[str, Any]]
    page: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes ``folder/round_NNNN`` atomically, then removes those before the last ``KEEP``."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        save_file(_owned(flatten(checkpoint.state)), scratch / "state.safetensors")
        clients = sorted(checkpoint.memories)
        for number, client in enumerate(clients):
            save_file(_owned(flatten(checkpoint.memories[client])), scratch / f"memory_{number}.safetensors")
        manifest = {
            "round": checkpoint.index,
            "recipe": checkpoint.page,
            "records": checkpoint.records,
            "clients": clients,
            "sha256": {file.name: _digest(file) for file in sorted(scratch.iterdir())},
        }
        (scratch / "checkpoint.json").write_text(json.dumps(manifest))
        for file in scratch.iterdir():
            _sync(file)
        final = folder / f"round_{checkpoint.index:04d}"
        if final.exists():
            shutil.rmtree(final)
        scratch.rename(final)
        _sync(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for old in _rounds(folder)[:-KEEP]:
        shutil.rmtree(old)


def load(folder: Path, page: Mapping[str, Any]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none.

    Raises:
        FedError: where it belongs to another recipe (names the keys that differ), or all are damaged.
    """
    damaged = []
    for path in reversed(_rounds(folder)):
        try:
            checkpoint = _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            damaged.append(f"{path.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
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
    return sorted(found, key=lambda path: int(path.name.removeprefix("round_")))


def _read(path: Path) -> Checkpoint:
    manifest = json.loads((path / "checkpoint.json").read_text())
    clients = manifest["clients"]
    files = ["state.safetensors", *(f"memory_{number}.safetensors" for number in range(len(clients)))]
    for name in files:  # names are ours, not the manifest's: nothing outside the folder is ever opened
        if _digest(path / name) != manifest["sha256"][name]:
            raise ValueError(f"{name} is not what was written")
    state, *memories = (unflatten(load_file(path / name)) for name in files)
    return Checkpoint(
        int(manifest["round"]),
        state,
        dict(zip(clients, memories, strict=True)),
        manifest["records"],
        manifest["recipe"],
    )


def differences(now: Any, then: Any, where: str = "") -> Iterator[str]:
    """Where two pages ask for another training, in words."""
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        for key in dict.fromkeys([*now, *then]):
            if where == "run" and key in {"rounds", "output", "tracker", "overwrite", "threads"}:
                continue  # a finished run may go on for more rounds, elsewhere, watched by someone else
            if not where and key == "hub":
                continue  # what becomes of the model afterwards
            yield from differences(now.get(key), then.get(key), f"{where}.{key}" if where else key)
    elif now != then:
        yield f"{where} is {now!r} now and was {then!r}"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
