"""Several runs side by side: mean and spread over seeds, the best against the runner-up, bytes to reach a score.

A run is read from its folder. In a sweep's folder its ``sweep.json`` says what each run stands for; elsewhere the
recipes do: the rule is the row, whatever else differs is the column, and seeds are repetitions of one another.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from fedllm import folder
from fedllm.core import FedError
from fedllm.progress import is_fraction, number, size
from fedllm.recipe import PROFILES
from fedllm.report import flat_settings, safe, said, table
from fedllm.story import (
    Story,
    at,
    base_row,
    clipped,
    course_of,
    json_in,
    lower_is_better,
    map_numbers,
    mapping,
    read,
    rows_of,
)

SHEET = "sweep.json"
"""What a sweep writes beside its runs: the labels of each."""

LEVEL = 0.05
SEED = "run.seed"


@dataclass(frozen=True)
class Entry:
    """One finished run.

    Args:
        method: its row: the rule, or what the sweep calls it.
        setting: its column: all else that differs between the runs, but for the seed.
        group: the columns that are averaged together, as a paper's table averages the tasks of a rank profile.
        pooled: it has one client, so it is no federation but the baseline of all data in one place.
    """

    run: Path
    story: Story
    method: str
    setting: str
    group: str
    seed: int
    pooled: bool

    @property
    def final(self) -> dict[str, float]:
        """The scores of the last round."""
        return dict(map_numbers(self.story.rounds[-1].get("eval")))

    def moved(self) -> dict[int, float]:
        """Bytes over the wire, both ways, until the end of each round."""
        total, found = 0.0, {}
        for rnd in self.story.rounds:
            total += (number(rnd.get("bytes_down")) or 0.0) + (number(rnd.get("bytes_up")) or 0.0)
            found[int(rnd["round"])] = total
        return found


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


def main(arguments: Sequence[str]) -> int:
    """``fedllm compare RUN... [--out DIR]``."""
    parser = argparse.ArgumentParser(prog="fedllm compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs' folders, or a sweep's")
    parser.add_argument(
        "--out", type=Path, help="where compare.md, the CSV files and the plots go; compare/ by default"
    )
    parser.add_argument("--score", help="the score to put first; by default the first that is a share of the test rows")
    parser.add_argument(
        "--target", help="METRIC=VALUE of `bytes to reach`; by default the loss that every rule reached"
    )
    given = parser.parse_args(arguments)
    sweep = given.runs[0] if len(given.runs) == 1 and (given.runs[0] / SHEET).is_file() else None
    print(write(given.runs, given.out or (sweep or Path()) / "compare", given.score, given.target))
    return 0


def write(runs: Sequence[Path], out: Path, score: str | None = None, target: str | None = None) -> Path:
    """Writes the comparison into ``out``: ``compare.md``, ``compare.csv``, ``runs.csv`` and the plots; the page's path.

    Raises:
        FedError: no finished run among them, or a score that none of them has.
    """
    from fedllm.compare_plots import draw

    entries, left_out = entries_of(runs)
    keys = metrics_of(entries, score)
    goal = goals(entries, keys, target)
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw(entries, keys, out)
    folder.write(out / "compare.md", text(entries, keys, goal, drawn, left_out))
    folder.write(out / "compare.csv", aggregated_csv(entries, keys))
    folder.write(out / "runs.csv", runs_csv(entries, keys))
    return out / "compare.md"


def entries_of(runs: Sequence[Path]) -> tuple[list[Entry], list[str]]:
    """The finished runs, in the order given, and why others were left out."""
    found: list[tuple[Path, Story, Mapping[str, str]]] = []
    left_out = []
    for run, labels in expanded(runs):
        try:
            story = read(run)
        except FedError as error:
            left_out.append(str(error))
            continue
        wanted = number(at(story.recipe, "run", "rounds")) or 0
        if story.rounds[-1]["round"] < wanted or not mapping(story.rounds[-1].get("eval")):
            left_out.append(f"{run.name} is not finished: {story.rounds[-1]['round']} of {wanted:.0f} rounds.")
            continue
        found.append((run, story, labels))
    if not found:
        raise FedError("there is no finished run to compare. " + " ".join(left_out[:3]))
    derived = differing([story for _, story, _ in found])
    entries = with_common_score([
        Entry(run, story, *placed(story, labels, derived), len(story.members) == 1) for run, story, labels in found
    ])  # fmt: skip
    twice = {(e.method, e.setting, e.seed): e for e in entries}
    if len(twice) < len(entries):
        kept = set(map(id, twice.values()))
        again = next(entry for entry in entries if id(entry) not in kept)
        other = twice[again.method, again.setting, again.seed].run
        raise FedError(f"{again.run} and {other} are the same rule, setting and seed: name one of them.")
    return entries, left_out


def expanded(runs: Sequence[Path]) -> list[tuple[Path, Mapping[str, str]]]:
    """Every run with its labels; a sweep's folder stands for its runs."""
    found: dict[Path, Mapping[str, str]] = {}
    for run in runs:
        if not run.is_dir():
            raise FedError(f"{run} is no folder: give runs' folders, or a sweep's.")
        if (run / SHEET).is_file():
            sheet = mapping(json_in(run / SHEET).get("runs"))
            found |= {run / name: mapping(labels) for name, labels in sheet.items() if "/" not in name}
        else:
            beside = mapping(json_in(run.resolve().parent / SHEET).get("runs"))
            found[run] = mapping(beside.get(run.resolve().name))
    return list(found.items())


def with_common_score(entries: Sequence[Entry]) -> list[Entry]:
    """Where tasks have different scores, each run's own first one also under a name that all of them share."""
    own = [next((key for key in entry.final if is_fraction(key)), None) for entry in entries]
    names = list(dict.fromkeys(key for key in own if key is not None))
    if len(names) < 2 or None in own:
        return list(entries)
    name = " or ".join(names)
    return [dataclasses.replace(e, story=also(e.story, str(key), name)) for e, key in zip(entries, own, strict=True)]


def also(story: Story, key: str, name: str) -> Story:
    """The story with the score ``key`` under another name too, in front."""
    rounds = [{**r, "eval": {name: at(r, "eval", key)} | dict(mapping(r.get("eval")))} for r in story.rounds]
    rows = [{**row, name: row.get(key)} for row in rows_of(story.summary)]
    return dataclasses.replace(story, rounds=tuple(rounds), summary={**story.summary, "rows": rows})


def placed(story: Story, labels: Mapping[str, str], derived: Sequence[str]) -> tuple[str, str, str, int]:
    """A run's method, setting, group and seed."""
    seed = int(number(at(story.recipe, "run", "seed")) or 0)
    others = {axis: str(label) for axis, label in labels.items() if axis != SEED}
    if others:
        row = next((axis for axis in ("rule", "algorithm.name") if axis in others), next(iter(others)))
        method = others.pop(row)
        told = list(others.values())
        return method, ", ".join(told), told[0] if len(told) > 1 else "", seed
    flat = settings_of(story)
    named = [f"{key} {shown(flat.get(key, '–'))}" for key in derived]
    return str(at(story.recipe, "algorithm", "name") or story.name), ", ".join(named), "", seed


def settings_of(story: Story) -> dict[str, str]:
    """What a run was made with, but for its rule, its seed and what only says where or how it is watched."""
    parts = ("model", "data", "clients", "worker", "run")
    flat = {f"{part}.{key}": value for part in parts for key, value in flat_settings(at(story.recipe, part))}
    ours = {
        "run.seed",
        "run.output",
        "run.resume",
        "run.overwrite",
        "run.plan",
        "run.threads",
        "run.tracker",
        "run.command",
    }
    return {key: value for key, value in flat.items() if key not in ours}


def differing(stories: Sequence[Story]) -> list[str]:
    """The settings in which these runs differ."""
    flats = [settings_of(story) for story in stories]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    return [key for key in keys if len({flat.get(key) for flat in flats}) > 1]


def shown(value: str) -> str:
    """A setting as a column's name; a list of ranks by its profile's name."""
    named = {json.dumps(list(ranks)): name for name, ranks in PROFILES.items()}
    return named.get(value, clipped(value, 30))


def metrics_of(entries: Sequence[Entry], first: str | None) -> list[str]:
    """The scores that all runs have, the one to report first in front."""
    keys = [key for key in entries[0].final if all(key in entry.final for entry in entries)]
    if first is not None and first not in keys:
        raise FedError(f"--score {first}: the runs' common scores are {', '.join(keys) or 'none'}.")
    if not keys:
        raise FedError("these runs have no score in common: compare runs of one task.")
    head = first or next((key for key in keys if is_fraction(key)), keys[0])
    return [head, *(key for key in keys if key != head)]


def settings_in(entries: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.setting for entry in entries))


def methods_in(entries: Iterable[Entry]) -> list[str]:
    """Those that are a federation."""
    return list(dict.fromkeys(entry.method for entry in entries if not entry.pooled))


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
        alone = [value for _, value in client_scores(entry.story, "alone", key)]
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


def client_scores(story: Story, kind: str, key: str) -> list[tuple[int, float]]:
    """``(rank, score)`` of every client ``alone``, or of its ``own`` model after the last round."""
    ranks = {member.id: member.rank for member in story.members}
    found = []
    for row in rows_of(story.summary):
        words = str(row.get("name", "")).replace(",", " ").split()
        value = number(row.get(key))
        if len(words) > 2 and words[0] == "client" and kind in words and words[1] in ranks and value is not None:
            found.append((ranks[words[1]], value))
    return sorted(found)


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


def goals(entries: Sequence[Entry], keys: Sequence[str], target: str | None) -> tuple[str, dict[str, float]]:
    """The metric of ``bytes to reach`` and its value in each setting.

    By default the held-out loss that every federated run of the setting reached, or the first score without one.
    """
    settings = settings_in(e for e in entries if not e.pooled)
    if target is not None:
        key, _, value = target.partition("=")
        try:
            wanted = float(value)
        except ValueError:
            wanted = math.nan
        if key not in keys or not math.isfinite(wanted):
            raise FedError(f"--target {target}: give METRIC=VALUE, a metric of {', '.join(keys)}.")
        return key, dict.fromkeys(settings, wanted)
    key = course_of(keys) or keys[0]
    reached: dict[str, list[float]] = {}
    for entry in (e for e in entries if not e.pooled):
        values = [value for _, value in entry.story.curve("eval", key)]
        reached.setdefault(entry.setting, []).append(min(values) if lower_is_better(key) else max(values))
    return key, {s: max(values) if lower_is_better(key) else min(values) for s, values in reached.items()}


def bytes_to(entry: Entry, key: str, target: float) -> float | None:
    """Bytes over the wire, both ways, until the first evaluated round that is at least as good; None where none is."""
    moved = entry.moved()
    for index, value in entry.story.curve("eval", key):
        if value <= target if lower_is_better(key) else value >= target:
            return moved[index]
    return None


def text(
    entries: Sequence[Entry],
    keys: Sequence[str],
    goal: tuple[str, Mapping[str, float]],
    drawn: Sequence[str],
    left_out: Sequence[str],
) -> str:
    """The comparison in Markdown."""
    parts = ["# Comparison", facts(entries), reading(entries)]
    for key in keys:
        parts += [f"## {said(key).capitalize()}", score_table(entries, key), *verdict_lines(entries, key)]
    parts += ["## By round and by bytes", *(f"![{ALT}]({name}.png)" for name in drawn if name.startswith("curves"))]
    parts += ["## Bytes to reach a score", bytes_table(entries, *goal)]
    if "clients" in drawn:
        parts += [
            "## Clients by rank",
            "![Each client's own model, by rank](clients.png)",
            clients_table(entries, keys[0]),
        ]
    elif any(client_scores(e.story, kind, keys[0]) for e in entries for kind in ("own", "alone")):
        parts += ["## Clients by rank", clients_table(entries, keys[0])]
    parts += ["## Runs", runs_table(entries, keys)]
    parts += ["\n".join(f"- Left out: {safe(why)}" for why in left_out)] if left_out else []
    return "\n\n".join(part for part in parts if part) + "\n"


ALT = "Scores by round and by bytes moved, mean and range over seeds"


def facts(entries: Sequence[Entry]) -> str:
    seeds = sorted({entry.seed for entry in entries})
    rounds = sorted({len(entry.story.rounds) for entry in entries})
    models = dict.fromkeys(str(at(entry.story.recipe, "model", "name") or "?") for entry in entries)
    tasks = dict.fromkeys(str(at(entry.story.recipe, "data", "name") or "?") for entry in entries)
    return " · ".join([
        f"{len(entries)} runs", f"seeds {', '.join(map(str, seeds))}", f"{' or '.join(map(str, rounds))} rounds",
        *(safe(Path(name).name) for name in models), *map(safe, tasks),
    ])  # fmt: skip


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


def score_table(entries: Sequence[Entry], key: str) -> str:
    """Mean ± standard deviation over seeds; the best rule of a column in bold, a star where it is significant."""
    by = columns(entries, key)
    judged = {setting: verdict(cells, key) for setting, cells in by.items()}
    lines = []
    for method in methods_in(entries):
        line = [safe(method)]
        for setting, cells in by.items():
            told, found = written(cells.get(method), key), judged[setting]
            sure = found is not None and found.p is not None and found.p < LEVEL
            top = {m for m, c in cells.items() if found is not None and c.mean == cells[found.best].mean}
            best = method in top and len(top) < len(cells)
            line.append(f"**{told}**" + "\\*" * sure if best else told)
        lines.append(line)
    under = {s: baselines(entries, s, key) for s in settings_in(e for e in entries if not e.pooled)}
    for name in dict.fromkeys(name for found in under.values() for name in found):
        lines.append([f"_{safe(name)}_", *(written(under[s].get(name) if s in under else None, key) for s in by)])
    unit = "%" if is_fraction(key) else "nats" if "loss" in key else ""
    return table([unit, *(safe(setting or "mean ± std") for setting in by)], lines)


def written(found: Cell | None, key: str) -> str:
    """``mean ± std``, percent where the score is a share."""
    if found is None:
        return "–"
    scale, digits = (100, 1) if is_fraction(key) else (1, 3)
    spread = "" if found.std is None else f" ± {scale * found.std:.{digits}f}"
    return f"{scale * found.mean:.{digits}f}{spread}"


def verdict_lines(entries: Sequence[Entry], key: str) -> list[str]:
    """What stands behind each bold number, in words."""
    lines = []
    for setting, cells in columns(entries, key).items():
        found = verdict(cells, key)
        if found is None:
            continue
        gap = f"{100 * found.gap:+.1f} points" if is_fraction(key) else f"{found.gap:+.3f}"
        how = found.test if found.p is None else f"{found.test}, p = {found.p:.2g}"
        ends = "" if found.p is None else ", significant" if found.p < LEVEL else ", not significant"
        start = f"{safe(setting)}: " if setting else ""
        told = f"{gap} ({how}){ends}" if found.gap else "the same"
        lines.append(f"- {start}{safe(found.best)} against {safe(found.second)}: {told}.")
    return ["\n".join(lines)] if lines else []


def reading(entries: Sequence[Entry]) -> str:
    """How the tables are to be read, and how far they can be trusted."""
    most = max((len({e.seed for e in entries if e.method == method}) for method in methods_in(entries)), default=0)
    notes = [
        f"Rules first, the best in bold, \\* where it beats the runner-up at p < {LEVEL}; baselines below, in italics. "
        "± is the standard deviation over seeds (n - 1). The runner-up is chosen "
        "after looking, and p is not corrected for it."
    ]
    if most < 5:
        notes.append(
            f"With {most} seed{'s' * (most != 1)} a test has next to no power: what is not significant here may well "
            "be real, and the order of the rules may be chance."
        )
    return " ".join(notes)


def bytes_table(entries: Sequence[Entry], key: str, targets: Mapping[str, float]) -> str:
    """Bytes both ways until the target, mean over the seeds that reached it."""
    lines = []
    for method in methods_in(entries):
        cells = []
        for setting, target in targets.items():
            group = [e for e in entries if e.method == method and e.setting == setting and not e.pooled]
            known = [moved for e in group if (moved := bytes_to(e, key, target)) is not None]
            part = f" ({len(known)} of {len(group)} seeds)" if known and len(known) < len(group) else ""
            cells.append(f"{size(fmean(known))}{part}" if known else "never" if group else "–")
        lines.append([safe(method), *cells])
    sign = "at most" if lower_is_better(key) else "at least"
    scale = 100 if is_fraction(key) else 1
    unit = " %" if is_fraction(key) else ""
    heads = [f"{safe(s)}: " * bool(s) + f"{said(key)} {sign} {scale * t:.4g}{unit}" for s, t in targets.items()]
    return table(["", *heads], lines)


def clients_table(entries: Sequence[Entry], key: str) -> str:
    """Mean score of the clients of a rank, each with its own model after the last round, or trained alone."""
    ranks = sorted({m.rank for e in entries if not e.pooled for m in e.story.members}, reverse=True)
    lines = []
    for method in methods_in(entries):
        for kind, words in (("own", "each client's own model"), ("alone", "each client alone")):
            group = [e for e in entries if e.method == method and not e.pooled]
            found = [pair for e in group for pair in client_scores(e.story, kind, key)]
            if found:
                of = [Cell(dict(enumerate(v for r, v in found if r == rank))) for rank in ranks]
                lines.append([f"{safe(method)}, {words}", *(written(c, key) if c.values else "–" for c in of)])
    head = [f"{said(key)}, over clients and seeds", *(f"rank {rank}" for rank in ranks)]
    return table(head, lines) if lines else ""


def runs_table(entries: Sequence[Entry], keys: Sequence[str]) -> str:
    head = ["run", "rule", "setting", "seed", *map(said, keys), "moved", "seconds"]
    lines = []
    for entry in entries:
        scores = [f"{100 * entry.final[k]:.1f}%" if is_fraction(k) else f"{entry.final[k]:.3f}" for k in keys]
        seconds = sum(value for _, value in entry.story.curve("seconds"))
        moved = size(max(entry.moved().values()))
        names = [safe(entry.run.name), safe(entry.method), safe(entry.setting) or "–", str(entry.seed)]
        lines.append([*names, *scores, moved, f"{seconds:.0f}"])
    return table(head, lines)


def aggregated_csv(entries: Sequence[Entry], keys: Sequence[str]) -> str:
    rows: list[list[Any]] = [
        ["metric", "setting", "method", "mean", "std", "seeds", "best", "p_against_runner_up", "test"]
    ]
    settings = settings_in(e for e in entries if not e.pooled)
    for key in keys:
        for setting, cells in columns(entries, key).items():
            found = verdict(cells, key)
            for method, c in cells.items():
                best = bool(found and found.best == method)
                judged = [found.p, found.test] if found and best else ["", ""]
                rows.append([key, setting, method, c.mean, c.std, len(c.values), best, *judged])
            for name, c in baselines(entries, setting, key).items() if setting in settings else ():
                rows.append([key, setting, name, c.mean, c.std, len(c.values), "", "", ""])
    return as_csv(rows)


def runs_csv(entries: Sequence[Entry], keys: Sequence[str]) -> str:
    rows: list[list[Any]] = [["run", "method", "setting", "seed", "pooled", "rounds", *keys, "bytes", "seconds"]]
    for e in entries:
        seconds = sum(value for _, value in e.story.curve("seconds"))
        scores = [e.final[key] for key in keys]
        rounds = len(e.story.rounds)
        rows.append(
            [e.run.name, e.method, e.setting, e.seed, e.pooled, rounds, *scores, max(e.moved().values()), seconds]
        )
    return as_csv(rows)


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([["" if v is None else v for v in row] for row in rows])
    return stream.getvalue()
