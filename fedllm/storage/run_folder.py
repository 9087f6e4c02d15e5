"""A run's folder: who may write into it, and how its files come to be, each whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedllm.errors import FedError
from fedllm.storage import files

MARK = "partition.json"
"""What tells a run's folder from others: written first and removed last."""

UNFINISHED = f".{MARK}.writing"
"""The first thing a run writes, all that is there of one that was killed in its first instant."""

OWN = re.compile(
    r"(partition|summary|versions|merged|hessian)\.json|recipe\.yaml|rounds\.jsonl|report\.md|eval|plots|checkpoint"
    r"|private|privacy\.jsonl"
    r"|(adapter|model)(_clients)?|merged|trackio|tensorboard|wandb|\.removing|\.(adapter|merged)\..+|\..+\.writing"
)
"""The names of all that a run, and what is done with it later, writes into its folder."""


LITTER = re.compile(r"\..+\.[0-9a-f]{8}\.(old|new)")
"""Adapters that a run was putting in place when it was killed; it exports again."""


def check(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises FedError where a run must not write into ``out``; touches nothing."""
    if out.exists() and not out.is_dir():
        raise FedError(f"run.output={out} is a file: give the folder that the run is to make.")
    place = next(place for place in (out, *out.absolute().parents) if os.path.lexists(place))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "no file can be made there" if place.is_dir() else "that is no folder"
        raise FedError(f"run.output={out} would be made in {place}, and {what}: give another folder.")
    if resume and not begun(out):
        raise FedError(
            f"run.resume=true, and there is no run in run.output={out} to resume: leave run.resume away to begin one, "
            "or give the folder of the run."
        )
    if not out.is_dir() or all(path.name == UNFINISHED for path in out.iterdir()):
        return
    if not begun(out):
        raise FedError(f"run.output={out} holds files that are not a run's: give an empty or new folder.")
    if not (resume or overwrite):
        raise FedError(
            f"run.output={out} holds a run already: run.resume=true continues it, run.overwrite=true starts anew."
        )
    linked = next((path for path in sorted(out.iterdir()) if path.is_symlink() and OWN.fullmatch(path.name)), None)
    if linked is not None and resume:
        raise FedError(f"{linked} is a link, and a run writes through none: put the file or folder itself there.")
    foreign = sorted(path.name for path in out.iterdir() if not OWN.fullmatch(path.name))
    if foreign and not resume:
        raise FedError(
            f"run.output={out} holds {', '.join(foreign[:3])}{' and more' * (len(foreign) > 3)} beside a run, and "
            "run.overwrite=true removes no more than a run's own files: move what is yours, or give another folder."
        )


def begun(out: Path) -> bool:
    """Whether there is a run to resume."""
    return (out / MARK).is_file()


@contextmanager
def held(out: Path, key: str = "run.output") -> Iterator[None]:
    """The folder, made where it is missing, for this process alone for as long as the context lasts.

    A lock of the system's on the folder itself: it goes with the process, however that ends. Where the file system has
    no such locks (some network ones), two runs are not kept apart.

    Args:
        key: the name of the setting that says where.

    Raises:
        FedError: another process has it, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.sync(out.parent)
        descriptor = os.open(out, os.O_RDONLY)
    except (OSError, ValueError) as error:
        raise FedError(f"{key}={out} cannot be made: {getattr(error, 'strerror', None) or error}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise FedError(f"another process is writing in {key}={out}: wait for it, or take another folder.") from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def prepare(out: Path, recipe: str, partition: Mapping[str, Any], *, overwrite: bool) -> None:
    """Puts the partition and the resolved recipe into the folder; ``overwrite`` removes the run before.

    ``MARK`` is written first and removed last, so that a run that is killed in between leaves a folder that ``check``
    still knows.
    """
    if overwrite and (out / MARK).is_file():
        _empty(out)
    write(out / MARK, json.dumps(partition, indent=1))
    write(out / "recipe.yaml", recipe)
    for name in ("eval", "plots"):
        files.make_folder(out / name)
    for path in (*out.iterdir(), *(out / "adapter_clients").glob(".*")):
        if LITTER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def keep_back(place: Path) -> None:
    """A folder for the operator's eyes alone."""
    files.make_folder(place).chmod(0o700)


def _empty(out: Path) -> None:
    checkpoints = out / "checkpoint"
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        checkpoints.rename(out / ".removing")  # at once: half a set of checkpoints is nobody's run
    for path in sorted(out.iterdir(), key=lambda path: path.name == MARK):
        if not OWN.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write(file: Path, text: str) -> None:
    """``text`` into ``file``, whole or not at all, through no link."""
    files.write(file, text)


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines."""
    write(file, "".join(json.dumps(row) + "\n" for row in rows))


def append_line(file: Path, row: Mapping[str, Any]) -> None:
    """One more JSON line, on disk when this returns."""
    files.append(file, json.dumps(row) + "\n")
