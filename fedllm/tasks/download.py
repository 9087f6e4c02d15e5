"""The commands in ``data/``: a corpus from where it comes from into local JSON Lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedllm.data.sources import Split, write_jsonl
from fedllm.errors import FedError
from fedllm.tasks.task import Task


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def command(
    description: str,
    make: Callable[..., Task],
    split: Split,
    expected: int | None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Writes DIR/train.jsonl or DIR/test.jsonl, whole or not at all. 0: done; 2: said in one sentence on stderr.

    Args:
        make: the task, from ``hub`` and ``revision`` where they are given.
        expected: the corpus's rows; another number is an error. ``None`` where it is not known.
    """
    parser = _Parser(description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--hub", default=None, metavar="ID", help="another copy of the data set")
    parser.add_argument("--revision", default=None, help="a commit of the data set, to pin it")
    given = parser.parse_args(arguments)
    asked: dict[str, Any] = {"hub": given.hub, "revision": given.revision}
    try:
        task = make(**{key: value for key, value in asked.items() if value is not None})
        rows, file = task.load(None, split), given.out / f"{split}.jsonl"
        if expected is not None and len(rows) != expected:
            raise FedError(f"there are {len(rows)} rows, and the corpus has {expected}: not written.")
        write_jsonl({file: rows})
    except (FedError, OSError) as error:
        parser.error(str(error))
    print(f"{len(rows)} rows in {file}")
    return 0
