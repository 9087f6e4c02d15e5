"""A run's folder: who may write into it, and how its files come to be, each whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.core import FedError

UNFINISHED = ".recipe.yaml.writing"
"""The first thing a run writes, all that is there of one that was killed in its first instant."""


def check(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises FedError where a run must not write into ``out``; touches nothing."""
    if out.exists() and not out.is_dir():
        raise FedError(f"run.output={out} is a file: give the folder that the run is to make.")
    if not out.is_dir() or all(path.name == UNFINISHED for path in out.iterdir()):
        return
    if not (out / "recipe.yaml").is_file():
        raise FedError(f"run.output={out} holds files that are not a run's: give an empty or new folder.")
    if not (resume or overwrite):
        raise FedError(
            f"run.output={out} holds a run already: run.resume=true continues it, run.overwrite=true starts anew."
        )


def prepare(out: Path, recipe: str, partition: Mapping[str, Any], *, overwrite: bool) -> None:
    """Makes the folder with the resolved recipe and the partition in it; ``overwrite`` removes the run before.

    The recipe marks the folder as a run's: it is written first and removed last, so that a run that is killed in
    between leaves a folder that ``check`` still knows.
    """
    if overwrite and (out / "recipe.yaml").is_file():
        _empty(out)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "recipe.yaml", recipe)
    (out / "eval").mkdir(exist_ok=True)
    write(out / "partition.json", json.dumps(partition, indent=1))


def _empty(out: Path) -> None:
    checkpoints = out / "checkpoint"
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        checkpoints.rename(out / ".removing")  # at once: half a set of checkpoints is nobody's run
    for path in sorted(out.iterdir(), key=lambda path: path.name == "recipe.yaml"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write(file: Path, text: str) -> None:
    """``text`` into ``file``, by way of a temporary one and a rename."""
    scratch = file.with_name(f".{file.name}.writing")
    with scratch.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(file)


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines."""
    write(file, "".join(json.dumps(row) + "\n" for row in rows))


def append_line(file: Path, row: Mapping[str, Any]) -> None:
    """One more JSON line, on disk when this returns."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
