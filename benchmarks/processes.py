"""How much faster two processes of one thread train a round's clients than one process of one thread.

    OMP_NUM_THREADS=1 python benchmarks/processes.py

The smoke recipe with longer rounds, so that training is what is measured: the seconds of ``rounds.jsonl`` from the
second round on (the first one warms up), the best of the runs. Needs two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = [
    "recipe=smoke", "run.threads=1", "run.output=run", "run.rounds=6", "clients.rank=[8,8,8,8]", "worker.steps=24",
    "data.test_rows=2", "eval.every=0", "eval.base=false", "eval.generate=false",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    seconds: dict[int, float] = {}
    adapters = set()
    for size in (1, 2):
        runs = [run(size) for _ in range(given.runs)]
        seconds[size] = min(time for time, _ in runs)
        adapters |= {adapter for _, adapter in runs}
    print(
        json.dumps(
            {
                "seconds_a_round_1_process": round(seconds[1], 3),
                "seconds_a_round_2_processes": round(seconds[2], 3),
                "speedup": round(seconds[1] / seconds[2], 2),
                "adapters_equal_to_the_bit": len(adapters) == 1,
                "cores": os.cpu_count(),
                "load_before": os.getloadavg()[0],
                "recipe": RECIPE,
            },
            indent=1,
        )
    )


def run(size: int) -> tuple[float, bytes]:
    """The median seconds of a round, and the adapter."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        subprocess.run(
            [*command, str(ROOT / "fedllm/train.py"), *RECIPE], cwd=folder, check=True, capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        rows = [json.loads(line) for line in (Path(folder) / "run/rounds.jsonl").read_text().splitlines()]
        adapter = (Path(folder) / "run/adapter/adapter_model.safetensors").read_bytes()
        return statistics.median(row["seconds"] for row in rows[1:]), adapter


if __name__ == "__main__":
    main()
