"""Several runs side by side: mean and spread over seeds, the best against the runner-up, the cost of a score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedllm.errors import FedError
from fedllm.reports.compare.cost_to_target import goals
from fedllm.reports.compare.plots import draw
from fedllm.reports.compare.runs import SHEET, entries_of, metrics_of
from fedllm.reports.compare.tables import aggregated_csv, runs_csv, text
from fedllm.storage import run_folder as folder


def default_folder(runs: Sequence[Path]) -> Path:
    """``compare/`` of a sweep, or of the working folder."""
    sweep = runs[0] if len(runs) == 1 and (runs[0] / SHEET).is_file() else Path()
    return sweep / "compare"


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
