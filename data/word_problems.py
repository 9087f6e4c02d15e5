"""Makes the demo's corpus: `python data/word_problems.py --train 2000 --test 200 --seed 0 --out DIR`.

Writes DIR/train.jsonl and DIR/test.jsonl in GSM8K's format. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from fedllm.tasks.word_problems import DIFFICULTIES, Row, split


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(description="Make seeded grade-school word problems in GSM8K's format.")
    parser.add_argument("--train", type=int, default=2000, metavar="ROWS")
    parser.add_argument("--test", type=int, default=200, metavar="ROWS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--difficulty",
        nargs="+",
        choices=DIFFICULTIES,
        default=DIFFICULTIES,
        help="repeats are weights: 'easy easy medium' is two thirds easy",
    )
    given = parser.parse_args(arguments)
    try:
        train, test = split(given.train, given.test, given.seed, given.difficulty)
        given.out.mkdir(parents=True, exist_ok=True)
        write_jsonl(given.out / "train.jsonl", train)
        write_jsonl(given.out / "test.jsonl", test)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{len(train)} train and {len(test)} test problems in {given.out}")
    return 0


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Readers see the old file or the whole new one, never a part."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # a temporary file is born 0600
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


if __name__ == "__main__":
    sys.exit(main())
