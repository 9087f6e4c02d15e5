"""Cells of a comparison, mean and deviation over seeds; the baselines below them, and who is better than whom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from fedllm.reports.compare.runs import Entry, methods_in, settings_in
from fedllm.reports.formatting import number
from fedllm.reports.run_record import at, base_row, client_scores, lower_is_better

LEVEL = 0.05


@dataclass(frozen=True)
class Cell:
    """A method in a setting: one value a seed."""

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        return fmean(self.values.values())

    @property
    def std(self) -> float | None:
        """Over seeds, with n - 1; None where there is one."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Verdict:
    """The best method of a column against the runner-up. ``p`` is two-sided; None where it cannot be had."""

    best: str
    second: str
    gap: float
    test: str
    p: float | None


def cell(entries: Sequence[Entry], method: str, setting: str, key: str) -> Cell | None:
    values = {e.seed: e.final[key] for e in entries if e.method == method and e.setting == setting}
    return Cell(values) if values else None


def average(entries: Sequence[Entry], method: str, key: str) -> Cell | None:
    """Over all settings, of the seeds that every one of them has."""
    cells = [cell(entries, method, setting, key) for setting in settings_in(entries)]
    whole = [c for c in cells if c is not None]
    if len(whole) < len(cells):
        return None
    seeds = set.intersection(*(set(c.values) for c in whole))
    return Cell({seed: fmean(c.values[seed] for c in whole) for seed in sorted(seeds)}) if seeds else None


def columns(entries: Sequence[Entry], key: str) -> dict[str, dict[str, Cell]]:
    """By the column's name, every method's cell; after the settings of a group their average."""
    methods = methods_in(entries)
    found: dict[str, dict[str, Cell]] = {}
    for group in dict.fromkeys(entry.group for entry in entries if not entry.pooled):
        ours = [entry for entry in entries if entry.group == group and not entry.pooled]
        found |= {s: {m: c for m in methods if (c := cell(ours, m, s, key))} for s in settings_in(ours)}
        if len(settings_in(ours)) > 1:
            found[f"{group}, average".removeprefix(", ")] = {m: c for m in methods if (c := average(ours, m, key))}
    return found


def baselines(entries: Sequence[Entry], setting: str, key: str) -> dict[str, Cell]:
    """By name: the untouched model, the clients alone, all data in one place; each from whichever runs scored it."""
    found: dict[str, dict[int, list[float]]] = {}

    def add(name: str, seed: int, values: Sequence[float]) -> None:
        if values:
            found.setdefault(name, {}).setdefault(seed, []).extend(values)

    pooled = pooled_for(entries, setting)
    for entry in [*(e for e in entries if e.setting == setting and not e.pooled), *pooled]:
        base = number(base_row(entry.story.summary).get(key))
        add("base model", entry.seed, [] if base is None else [base])
        alone = list(client_scores(entry.story, "alone", key).values())
        best = [min(alone) if lower_is_better(key) else max(alone)] if alone and not entry.pooled else []
        if not entry.pooled:
            add(f"a client alone, mean of {len(alone)}", entry.seed, alone)
            add("the best client alone", entry.seed, best)
    for entry in pooled:
        add("all data in one place", entry.seed, [entry.final[key]])
    return {name: Cell({seed: fmean(v) for seed, v in sorted(by.items())}) for name, by in found.items()}


def pooled_for(entries: Sequence[Entry], setting: str) -> list[Entry]:
    """The runs with all data in one place to hold a setting against: its own, or any of the same model and task."""
    pooled = [entry for entry in entries if entry.pooled]
    own = [entry for entry in pooled if entry.setting == setting]
    tasks = {task_of(entry) for entry in entries if entry.setting == setting}
    return own or [entry for entry in pooled if task_of(entry) in tasks]


def task_of(entry: Entry) -> tuple[str, str]:
    return str(at(entry.story.recipe, "model", "name")), str(at(entry.story.recipe, "data", "name"))


def verdict(cells: Mapping[str, Cell], key: str) -> Verdict | None:
    """The best of at least two methods against the next.

    Where they share their seeds the t-test is paired, since a seed fixes the split, the order and the test rows of
    both; else it is Welch's. The runner-up was chosen after looking, and ``p`` is not corrected for that.
    """
    ordered = sorted(cells, key=lambda name: cells[name].mean, reverse=not lower_is_better(key))
    if len(ordered) < 2:
        return None
    best, second = ordered[:2]
    ours, theirs = cells[best].values, cells[second].values
    gap = cells[best].mean - cells[second].mean
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) > 1:
        gaps = [ours[seed] - theirs[seed] for seed in shared]
        spread = stdev(gaps) / math.sqrt(len(gaps))
        t = abs(fmean(gaps)) / spread if spread > 1e-9 * abs(fmean(gaps)) else None  # the same gap each time: no test
        p = None if t is None else 2 * float(stats.t.sf(t, len(gaps) - 1))
        test = f"paired t-test over {len(shared)} seeds" if p is not None else "the same gap with each seed: no test"
        return Verdict(best, second, fmean(gaps), test, p)
    if len(ours) > 1 and len(theirs) > 1 and (stdev(ours.values()) or stdev(theirs.values())):
        p = float(stats.ttest_ind(list(ours.values()), list(theirs.values()), equal_var=False).pvalue)
        return Verdict(best, second, gap, f"Welch's t-test over {len(ours)} and {len(theirs)} seeds", p)
    return Verdict(best, second, gap, "no test: one seed", None)
