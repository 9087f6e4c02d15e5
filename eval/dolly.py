"""Dolly's Rouge-L F of generated answers, by category and overall.

    accelerate launch eval/dolly.py model=ID_OR_FOLDER [adapter=PEFT_FOLDER] [data.path=FILE rows=32] [a.b=c ...]

Or run=FOLDER of a run. The keys and the files that it writes: `fedllm.evaluation.run`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # launched by path: this folder's modules are not top-level ones

from fedllm.evaluation.run import command  # noqa: E402

if __name__ == "__main__":
    sys.exit(command("dolly"))
