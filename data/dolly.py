"""Fetches databricks-dolly-15k from the Hub: `python data/dolly.py --out DIR`, then `data.name=dolly data.path=DIR`.

Writes DIR/train.jsonl, 15,011 rows; the task holds some of them out for testing (`data.held_out`).
"""

from __future__ import annotations

import sys
from functools import partial

from fedllm.tasks.dolly import Dolly
from fedllm.tasks.download import command


def main(arguments: list[str] | None = None) -> int:
    """0: written; 2: it cannot be had, said in one sentence."""
    said = "Fetch Dolly (15,011 instructions, CC BY-SA 3.0) into local JSON Lines."
    return command(said, partial(Dolly, held_out=0), "train", 15011, arguments)


if __name__ == "__main__":
    sys.exit(main())
