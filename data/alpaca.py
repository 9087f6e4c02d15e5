"""Fetches Stanford Alpaca from the Hub: `python data/alpaca.py --out DIR`, then `data.name=alpaca data.path=DIR`.

Writes DIR/train.jsonl, 52,002 rows; the task holds some of them out for testing (`data.held_out`).
"""

from __future__ import annotations

import sys
from functools import partial

from fedllm.tasks.alpaca import Alpaca
from fedllm.tasks.download import command


def main(arguments: list[str] | None = None) -> int:
    """0: written; 2: it cannot be had, said in one sentence."""
    said = "Fetch Alpaca (52,002 instructions, CC BY-NC 4.0: not for commerce) into local JSON Lines."
    return command(said, partial(Alpaca, held_out=0), "train", 52002, arguments)


if __name__ == "__main__":
    sys.exit(main())
