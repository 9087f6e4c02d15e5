"""Who beats whom where clients differ in capacity: the toy's orderings, or the same on CIFAR-10, one command each.

    python benchmarks/vision_orderings.py toy --seeds 0 1 --out results/vision_toy
    python benchmarks/vision_orderings.py svd --seeds 0 1 --out results/vision_svd
    python benchmarks/vision_orderings.py cifar10 --data FOLDER --rounds 100 --out results/vision_cifar10

``OUT.json`` has the command, every run's accuracy by round, its last one, and the bytes of the run; ``OUT.png`` the
curves. Every line of ``claims`` says whether an ordering of the literature holds in these runs; a toy need not show all
of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
MIXED, TWO, ONE = "clients.levels=[b4,b3,b2]", "clients.levels=[b3,b2]", "clients.levels=[b2]"
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Study:
    """A page, the runs of it, and what is claimed of their last accuracies (in points)."""

    page: tuple[str, ...]
    runs: Mapping[str, tuple[str, ...]]
    claims: Mapping[str, Callable[[Scores], bool]]


CAPACITIES = {
    "FedAvg": ("algorithm.name=fedavg", MIXED),
    "FedLMT": (MIXED,),
    "HeteroFL {1, 3/4, 1/2}": ("algorithm.name=heterofl", MIXED),
    "HeteroFL {3/4, 1/2}": ("algorithm.name=heterofl", TWO),
    "HeteroFL {1/2}": ("algorithm.name=heterofl", ONE),
    "FedRolex {1, 3/4, 1/2}": ("algorithm.name=fedrolex", MIXED),
    "FedRolex {1/2}": ("algorithm.name=fedrolex", ONE),
    "FedDropout {1, 3/4, 1/2}": ("algorithm.name=feddropout", MIXED),
    "FedHM": ("algorithm.name=fedhm", "algorithm.rho=1", "algorithm.alpha=0.5", MIXED),
}
CLAIMS: dict[str, Callable[[Scores], bool]] = {
    "FedLMT >= HeteroFL with full clients": lambda a: a["FedLMT"] >= a["HeteroFL {1, 3/4, 1/2}"],
    "FedLMT >= HeteroFL without full clients": lambda a: a["FedLMT"] >= a["HeteroFL {3/4, 1/2}"],
    "HeteroFL without full clients loses 20 points": lambda a: a["HeteroFL {1/2}"] < a["HeteroFL {1, 3/4, 1/2}"] - 20,
    "FedAvg >= FedLMT - 1": lambda a: a["FedAvg"] >= a["FedLMT"] - 1,
}
STUDIES = {
    "toy": Study(("recipe=toy_capacities",), CAPACITIES, CLAIMS),
    "svd": Study(
        ("recipe=toy_capacities", "data.sigma=1.3", "clients.levels=[]"),
        {
            f"SVD every {every} rounds" if every else "no SVD (FedLMT, spectral)": (
                "algorithm.name=fedhm",
                "algorithm.rho=1",
                "algorithm.alpha=0.19",
                f"algorithm.svd_every={every or 'null'}",
            )
            for every in (1, 5, 25, 0)
        },
        {
            "an SVD every 25 rounds is not worse than every round": lambda a: (
                a["SVD every 25 rounds"] >= a["SVD every 1 rounds"] - 1
            ),
            "no SVD is not worse than every round": lambda a: (
                a["no SVD (FedLMT, spectral)"] >= a["SVD every 1 rounds"] - 1
            ),
        },
    ),
    "cifar10": Study(
        ("recipe=toy_capacities", "data.name=cifar10", "worker.weight_decay=5e-4"),
        {name: CAPACITIES[name] for name in CAPACITIES if name.startswith(("FedAvg", "FedLMT", "HeteroFL"))},
        CLAIMS,
    ),
}


def run(arguments: Sequence[str], scratch: Path) -> dict[str, Any]:
    """One federated run through the command line: accuracy in points by round, and bytes."""
    command = [sys.executable, "-m", "fedllm.cli", "train", *arguments, f"run.output={scratch}", "run.threads=1"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(arguments)}: {done.stderr.strip()}")
    rows = [json.loads(line) for line in (scratch / "rounds.jsonl").read_text().splitlines()]
    return {
        "accuracy": {row["round"]: 100 * row["eval"]["accuracy"] for row in rows if row["eval"]},
        "bytes": sum(row["bytes_down"] + row["bytes_up"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
    }


def study(chosen: Study, extra: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Every run at every seed; the last accuracies are means over the seeds."""
    runs: dict[str, Any] = {}
    for name, overrides in chosen.runs.items():
        runs[name] = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as scratch:
                arguments = [*chosen.page, *overrides, *extra, f"run.seed={seed}"]
                runs[name].append({"arguments": arguments, **run(arguments, Path(scratch) / "run")})
            print(f"{name}, seed {seed}: {list(runs[name][-1]['accuracy'].values())[-1]:.1f}", flush=True)
    last = {name: fmean(list(one["accuracy"].values())[-1] for one in several) for name, several in runs.items()}
    return {"last": last, "claims": {text: holds(last) for text, holds in chosen.claims.items()}, "runs": runs}


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Mean accuracy over the seeds by round, a line a run."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, several in results["runs"].items():
        rounds = list(several[0]["accuracy"])
        axes.plot(rounds, [fmean(one["accuracy"][r] for one in several) for r in rounds], label=name, linewidth=1.5)
    axes.set(xlabel="round", ylabel="accuracy of the served network, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--data", help="data.path, for real data")
    parser.add_argument("--train-rows", type=int)
    parser.add_argument("--test-rows", type=int)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    extra = [f"run.rounds={given.rounds}"] if given.rounds else []
    extra += [f"data.path={Path(given.data).resolve()}"] if given.data else []
    extra += [f"data.train_rows={given.train_rows}"] if given.train_rows else []
    extra += [f"data.test_rows={given.test_rows}"] if given.test_rows else []
    results = study(STUDIES[given.study], extra, given.seeds)
    shown = [part for part in extra if not part.startswith("data.path=")]  # where the data lay is nobody's business
    for several in results["runs"].values():
        for one in several:
            one["arguments"] = [part for part in one["arguments"] if not part.startswith("data.path=")]
    command = shlex.join(["python", "benchmarks/vision_orderings.py", *sys.argv[1:]])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"command": command, "overrides": shown, **results}
    given.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    draw(results, given.out.with_suffix(".png"))
    for text, holds in results["claims"].items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {text}")


if __name__ == "__main__":
    main()
