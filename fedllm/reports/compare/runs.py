"""What a comparison compares: finished runs, read from their folders, each with its row, its column and its seed.

In a sweep's folder its ``sweep.json`` says what each run stands for; elsewhere the recipes do: the rule is the row,
whatever else differs is the column, and seeds are repetitions of one another.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.config.rank_profiles import PROFILES
from fedllm.errors import FedError
from fedllm.reports.formatting import is_fraction, number
from fedllm.reports.report import flat_settings
from fedllm.reports.run_record import Story, at, clipped, json_in, map_numbers, mapping, read, rows_of

SHEET = "sweep.json"
"""What a sweep writes beside its runs: the labels of each."""
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
        return self._until("bytes_down", "bytes_up")

    def computed(self) -> dict[int, float]:
        """FLOPs of the clients' training until each round's end (``fedllm.models.flops.Meter``); 0 where unknown."""
        return self._until("flops")

    def _until(self, *keys: str) -> dict[int, float]:
        total, found = 0.0, {}
        for rnd in self.story.rounds:
            total += sum(number(rnd.get(key)) or 0.0 for key in keys)
            found[int(rnd["round"])] = total
        return found


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
    """Where tasks have no score in common, each run's own first one also under a name that all of them share."""
    if any(is_fraction(key) and all(key in entry.final for entry in entries) for key in entries[0].final):
        return list(entries)
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
        "run.parallel",
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
