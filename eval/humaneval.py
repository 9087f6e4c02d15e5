"""HumanEval pass@k; the model's programs run in a sandbox.

    accelerate launch eval/humaneval.py model=ID_OR_FOLDER [adapter=PEFT_FOLDER] allow_code_execution=true [a.b=c ...]

`samples=20 k=[1,10]` draws 20 answers a problem and estimates pass@1 and pass@10; one answer is greedy.

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
    sys.exit(command("humaneval"))
