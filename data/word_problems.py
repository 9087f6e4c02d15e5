"""Makes the demo's corpus: `python data/word_problems.py --train 2000 --test 200 --seed 0 --out DIR`.

Writes DIR/train.jsonl and DIR/test.jsonl in GSM8K's format, both or neither. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from fedllm.data.sources import write_jsonl
from fedllm.errors import FedError
from fedllm.tasks.word_problems import DIFFICULTIES, split


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
        write_jsonl({given.out / "train.jsonl": train, given.out / "test.jsonl": test})
    except (ValueError, FedError, OSError) as error:
        parser.error(str(error))
    print(f"{len(train)} train and {len(test)} test problems in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
