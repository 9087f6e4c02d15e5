"""Where rows come from: JSON files, the Hub, and a held-out part of either. Nothing that a row says is ever opened."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from fedllm.config.suggest import closest
from fedllm.data.json_rows import Row, read
from fedllm.errors import FedError, Unreachable

Split = Literal["train", "test"]
Sources = Mapping[str, Callable[[], list[Row]]]
"""What a corpus has: a reader for its ``train`` split, its ``test`` split, or both."""

SPLITS = ("train", "test")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def local(path: str) -> Sources:
    """A folder with ``train`` and ``test`` files, or one file: JSON Lines or a JSON list, gzipped or not.

    A file called ``test.*`` holds the test split, any other one the training split.

    Raises:
        FedError: no such path, or a folder without these files.
    """
    given = Path(path).expanduser()
    try:
        if os.path.lexists(given) and not given.is_dir():
            name = given.name.partition(".")[0]
            return {name if name in SPLITS else "train": partial(read, given)}
        if not given.is_dir():
            raise FedError(f"data.path={path} does not exist.{_near_path(given)}")
        inside = sorted(entry.name for entry in given.iterdir())
    except OSError as error:
        raise FedError(f"data.path={path} cannot be read: {error.strerror}.") from error
    found = {split: [f"{split}{suffix}" for suffix in SUFFIXES if f"{split}{suffix}" in inside] for split in SPLITS}
    for split, names in found.items():
        if len(names) > 1:
            raise FedError(
                f"data.path={path} has {' and '.join(names)}: which holds the {split} rows? Keep one of them."
            )
    if not any(found.values()):
        files = ", ".join(name for name in inside if name.endswith(SUFFIXES)) or "none"
        raise FedError(f"data.path={path} has neither train.jsonl nor test.jsonl. JSON files there: {files}; name one.")
    return {split: partial(read, given / names[0]) for split, names in found.items() if names}


def hub(name: str, subset: str | None, revision: str | None, files: str | None = None) -> Sources:
    """The splits of a data set on the Hub; or, where ``name`` is a format such as ``json``, of ``files`` at an address.

    Only data files: ``datasets`` runs no loading script.

    Raises:
        FedError: the library is missing.
        Unreachable: the Hub cannot be reached, or has no such data set.
    """
    remedy = "Give local files instead: data.path=FOLDER with train.jsonl and test.jsonl."
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise FedError(f"{name} is on the Hub, and the package 'datasets' is not installed. {remedy}") from error
    try:
        splits = load_dataset(name, subset, revision=revision, **({"data_files": files} if files else {}))
    except Exception as error:  # the client's errors come from five libraries; to the user they are one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unreachable(f"The data set {files or name} could not be had from the Hub ({reason}). {remedy}") from error
    return {split: splits[split].to_list for split in SPLITS if split in splits}


def choose(sources: Sources, split: Split, held_out: int, seed: int, where: str) -> tuple[list[int], list[Row]]:
    """The rows of a split, and the number of each in its file, from 1.

    Where there is no test split, ``held_out`` training rows are it, and are not trained on.

    Raises:
        FedError: no training rows, no test rows, or more held out than there are.
    """
    if split in sources and (split == "test" or "test" in sources or held_out == 0):
        rows = sources[split]()
        return list(range(1, len(rows) + 1)), rows
    if "train" not in sources:
        raise FedError(f"{where} has only test rows. Give the folder that has train.jsonl too.")
    if split == "test" and held_out == 0:
        raise FedError(
            f"{where} has only training rows. Give a folder with train.jsonl and test.jsonl, or keep some rows for "
            "testing: data.held_out=200."
        )
    rows = sources["train"]()
    if not 0 < held_out < len(rows):
        raise FedError(
            f"data.held_out={held_out}: it must be more than 0 and less than the {len(rows)} rows of {where}."
        )
    kept = _lots(rows, seed)[:held_out]
    chosen = sorted(kept) if split == "test" else sorted(set(range(len(rows))) - set(kept))
    return [i + 1 for i in chosen], [rows[i] for i in chosen]


def label(row: Row, column: str) -> str | int:
    """The row's label.

    Raises:
        FedError: no such column, or neither text nor a whole number in it.
    """
    if column not in row:
        raise FedError(f"There is no column {column!r} to take labels from.{suggest(column, row)}")
    value = row[column]
    if not isinstance(value, str | int):
        raise FedError(f"Column {column!r} holds {str(value)[:40]!r}: a label is text or a whole number.")
    return value


def suggest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'? There are: ...``, the guess only where one is near."""
    names = list(known)
    near = closest(name, names)
    guess = f" Did you mean {near!r}?" if near else ""
    return f"{guess} There are: {', '.join(names) or 'none'}."


def write_jsonl(files: Mapping[Path, Sequence[Row]]) -> None:
    """Writes each file whole or, where anything fails before all are on the disk, none of them."""
    ready: dict[Path, str] = {}
    try:
        for path, rows in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            ready[path] = temporary
            with open(handle, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # a temporary file is born 0600
        for path in list(ready):
            os.replace(ready.pop(path), path)
    finally:
        for temporary in ready.values():
            os.unlink(temporary)


def _lots(rows: Sequence[Row], seed: int) -> list[int]:
    """Indices in a drawn order that depends on what the rows say, not on where they stand in the file."""

    def lot(i: int) -> bytes:
        text = json.dumps([seed, rows[i]], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    return sorted(range(len(rows)), key=lot)


def _near_path(missing: Path) -> str:
    """The nearest name where the path leaves what exists."""
    parent, name = missing.absolute().parent, missing.name
    while not parent.is_dir():
        parent, name = parent.parent, parent.name
    near = closest(name, sorted(entry.name for entry in parent.iterdir()))
    return f" Did you mean {parent / near}?" if near else f" {parent} has nothing of a name like {name}."
