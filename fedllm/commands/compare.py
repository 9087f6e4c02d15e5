"""Several runs side by side: mean and spread over seeds, the best against the runner-up, the cost of a score."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fedllm.errors import FedError
from fedllm.reports.compare.cost_to_target import goals
from fedllm.reports.compare.plots import draw
from fedllm.reports.compare.runs import SHEET, entries_of, metrics_of
from fedllm.reports.compare.tables import aggregated_csv, runs_csv, text
from fedllm.storage import run_folder as folder


def main(arguments: Sequence[str]) -> int:
    """``fedllm compare RUN... [--out DIR]``."""
    parser = argparse.ArgumentParser(prog="fedllm compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs' folders, or a sweep's")
    parser.add_argument(
        "--out", type=Path, help="where compare.md, the CSV files and the plots go; compare/ by default"
    )
    parser.add_argument("--score", help="the score to put first; by default the first that is a share of the test rows")
    parser.add_argument("--target", help="METRIC=VALUE to reach; by default the loss that every rule reached")
    given = parser.parse_args(arguments)
    sweep = given.runs[0] if len(given.runs) == 1 and (given.runs[0] / SHEET).is_file() else None
    print(write(given.runs, given.out or (sweep or Path()) / "compare", given.score, given.target))
    return 0


def write(runs: Sequence[Path], out: Path, score: str | None = None, target: str | None = None) -> Path:
    """Writes the comparison into ``out``: ``compare.md``, ``compare.csv``, ``runs.csv`` and the plots; the page's path.

    Raises:
        FedError: no finished run among them, or a score that none of them has.
    """
    entries, left_out = entries_of(runs)
    keys = metrics_of(entries, score)
    goal = goals(entries, keys, target)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedError(f"--out {out}: no folder can be made there ({error.strerror}).") from error
    drawn = draw(entries, keys, out)
    folder.write(out / "compare.md", text(entries, keys, goal, drawn, left_out))
    folder.write(out / "compare.csv", aggregated_csv(entries, keys))
    folder.write(out / "runs.csv", runs_csv(entries, keys))
    return out / "compare.md"
