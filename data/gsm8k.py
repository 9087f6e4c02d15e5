"""Fetches GSM8K from the Hub: `python data/gsm8k.py --out DIR`, then `data.name=gsm8k data.path=DIR` in a run.

Writes DIR/train.jsonl and DIR/test.jsonl, both or neither.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from fedllm.data.sources import Row, write_jsonl
from fedllm.errors import FedError
from fedllm.tasks.gsm8k import GSM8K


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(description="Fetch GSM8K (7,473 + 1,319 problems, MIT licence) into local JSON Lines.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--hub", default=GSM8K.hub, metavar="ID", help="default: %(default)s")
    parser.add_argument("--revision", default=None, help="a commit of the data set, to pin it")
    given = parser.parse_args(arguments)
    try:
        files = fetch(GSM8K(hub=given.hub, revision=given.revision), given.out)
        write_jsonl(files)
    except (FedError, OSError) as error:
        parser.error(str(error))
    print(", ".join(f"{len(rows)} rows in {path}" for path, rows in files.items()))
    return 0


def fetch(task: GSM8K, folder: Path) -> dict[Path, list[Row]]:
    """What to write where. Raises FedError where a split has not the rows that GSM8K has."""
    files = {folder / "train.jsonl": task.load(None, "train"), folder / "test.jsonl": task.load(None, "test")}
    for (path, rows), expected in zip(files.items(), task.rows.values(), strict=True):
        if len(rows) != expected:
            raise FedError(f"{task.hub} has {len(rows)} rows for {path.name}, and GSM8K has {expected}: not written.")
    return files


if __name__ == "__main__":
    sys.exit(main())
