"""Many runs from one page: a base recipe and axes of overrides, one run for each combination, resumably.

    recipe: demo                          # what every run starts from
    set: {run.rounds: 3}                  # overrides of every run
    over:                                 # the axes; one run for each combination; a later axis wins over an earlier
      rule:                               # a name for each choice, and its overrides
        fedhl: {algorithm.name: fedhl}
        fedit: {algorithm.name: fedit, clients.rank: [4, 4, 4, 4]}
      run.seed: [0, 1]                    # or a key with its values
    without:                              # combinations to leave out
      - {rule: fedit, run.seed: 1}

Every run is a process of its own, so that nothing of one is left in the memory of the next. What is finished is
skipped; what was broken off goes on after its last whole round.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.commands import compare
from fedllm.config import pages, plain_yaml
from fedllm.config.arguments import spelled
from fedllm.config.suggest import nearest
from fedllm.core import Client
from fedllm.errors import FedError
from fedllm.recipe import page as recipes
from fedllm.recipe.sections import Recipe
from fedllm.reports import run_record as story
from fedllm.reports.compare import runs as entries
from fedllm.reports.formatting import span
from fedllm.storage import checkpoint
from fedllm.storage import run_folder as folder

KEYS = ("recipe", "output", "set", "over", "without")
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


@dataclass(frozen=True)
class Planned:
    """One run of a sweep: its folder's name, what it stands for, its command line, and what that resolves to."""

    name: str
    labels: Mapping[str, str]
    arguments: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    name: str
    output: Path
    runs: tuple[Planned, ...]


def run(
    words: Sequence[str], *, out: Path | None = None, plan_only: bool = False, jobs: int | None = None, launch: str = ""
) -> int:
    """Runs a page, or the axes that the words name. 0: all runs are finished; 1: some broke off."""
    sweep = of_words(words, out)
    standing = {run.name: state(sweep.output / run.name, run.recipe) for run in sweep.runs}
    for run in sweep.runs:
        print(f"{run.name:40} {standing[run.name]}")
    if plan_only:
        return 0
    folder_of(sweep)
    jobs = jobs or max(1, len(devices()))
    broken = execute(sweep, [run for run in sweep.runs if standing[run.name] != DONE], jobs, shlex.split(launch))
    if len(broken) < len(sweep.runs):
        print(f"comparison: {compare.write([sweep.output], sweep.output / 'compare')}")
    if broken:
        print(f"fedllm: {len(broken)} of {len(sweep.runs)} runs broke off: {', '.join(broken)}. "
              "The same command goes on where they stopped.", file=sys.stderr)  # fmt: skip
    return 1 if broken else 0


def of_words(words: Sequence[str], output: Path | None = None) -> Sweep:
    """The runs of ``PAGE a.b=c``, or of ``recipe=NAME over.AXIS=[...] a.b=c`` without a page; axes add to a page's.

    Raises:
        FedError: as ``load``, and where there is neither a page nor a recipe with an axis.
    """
    page = words[0] if words and "=" not in words[0] and not words[0].startswith("-") else None
    told: dict[str, Any] = {"over": {}}
    overrides = []
    for word in spelled(["", *words[bool(page) :]])[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise FedError(f"{word!r} is not understood: give a.b=c, or over.AXIS=[...].")
        if key.startswith("over."):
            told["over"][key.removeprefix("over.")] = _value(word)
        elif key == "without":
            told["without"] = _value(word)
        elif key == "recipe":
            told["recipe"] = value
        else:
            overrides.append(word)
    if page:
        return load(page, overrides, output, told)
    if not told.get("recipe") or not told["over"]:
        raise FedError("which sweep? Give a page of sweeps/, or recipe=NAME and axes such as over.run.seed=[0,1,2].")
    name = Path(str(told["recipe"])).stem
    return expand(f"{name}_sweep", "this sweep", told, overrides, output)


def _value(word: str) -> Any:
    key, _, text = word.partition("=")
    try:
        return plain_yaml.parse(text)
    except FedError as error:
        raise FedError(f"{word!r} is not understood: give {key}=[one, another].") from error


def load(
    page: str, overrides: Sequence[str] = (), output: Path | None = None, more: Mapping[str, Any] | None = None
) -> Sweep:
    """The runs of a page, each recipe resolved and checked.

    Args:
        more: ``recipe``, ``over`` and ``without`` of the command line, which win over the page's.

    Raises:
        FedError: an unknown page, key or name, a combination that cannot run, two runs of one name.
    """
    path = find(page)
    try:
        told = plain_yaml.read(path)
    except FedError as error:
        raise FedError(f"sweep {page}: {error}") from error
    if more and isinstance(told, dict) and isinstance(told.get("over", {}), dict):
        told = told | dict(more) | {"over": (told.get("over") or {}) | more["over"]}
    if (
        not isinstance(told, dict)
        or not told.get("recipe")
        or not isinstance(told.get("over"), dict)
        or not told["over"]
    ):
        raise FedError(f"{path}: a sweep is a page with at least `recipe: NAME` and `over:`, the axes.")
    return expand(path.stem, str(path), told, overrides, output)


def expand(name: str, where: str, told: Mapping[str, Any], overrides: Sequence[str], output: Path | None) -> Sweep:
    """One run for each combination of the axes."""
    for key in told:
        if key not in KEYS:
            raise FedError(f"{where}: {nearest(str(key), KEYS, 'key of a sweep')}")
    axes = {str(name): choices(str(name), values) for name, values in told["over"].items()}
    without = told.get("without") or []
    check_without(without, axes)
    common = [f"recipe={told['recipe']}", *assignments(told.get("set") or {}, "set")]
    runs = []
    for picked in itertools.product(*(choice.items() for choice in axes.values())):
        labels = {axis: label for axis, (label, _) in zip(axes, picked, strict=True)}
        if any(all(labels[axis] in listed(label) for axis, label in leave.items()) for leave in without):
            continue
        arguments = latest([*common, *(one for _, chosen in picked for one in chosen), *overrides])
        runs.append(planned(labels, arguments))
    if not runs:
        raise FedError(f"{where}: `without` leaves no run.")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise FedError(
            f"{where}: two runs would both be called {max(names, key=names.count)}: give the choices other names."
        )
    return Sweep(name, output or Path(str(told.get("output") or f"runs/{name}")), tuple(runs))


def planned(labels: Mapping[str, str], arguments: Sequence[str]) -> Planned:
    told = ", ".join(f"{axis}={label}" for axis, label in labels.items())
    try:
        recipe = recipes.load(arguments)
        kinds = itertools.product(recipe.clients.ranks(), recipe.clients.levels or ("",))
        recipe.algorithm.validate([Client(f"c{i}", 0, rank, level=level) for i, (rank, level) in enumerate(kinds)])
    except FedError as error:
        raise FedError(
            f"the run {told}: {error} (a combination that makes no sense is left out by `without`.)"
        ) from error
    parts = [f"seed{label}" if axis == entries.SEED else label for axis, label in labels.items()]
    name = "_".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-") for part in parts)
    return Planned(name, dict(labels), tuple(arguments), recipe)


def find(page: str) -> Path:
    """A path to a YAML file, or a name in ``sweeps/`` beside ``recipes/``."""
    return pages.find(page, "sweeps", "sweep ")


def choices(axis: str, values: Any) -> dict[str, list[str]]:
    """Label -> overrides: of named choices, or of the values of a key."""
    if isinstance(values, dict) and values:
        return {str(label): assignments(chosen, f"over.{axis}.{label}") for label, chosen in values.items()}
    if isinstance(values, list) and values:
        found = {plain(value): assignments({axis: value}, f"over.{axis}") for value in values}
        if len(found) == len(values):
            return found
    raise FedError(f"over.{axis}: a list of different values of that key, or names with their overrides.")


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def assignments(told: Any, where: str) -> list[str]:
    """``{a.b: c}`` as ``a.b=c``, as the command line takes it."""
    if not isinstance(told, dict):
        raise FedError(f"{where}={told!r}: write overrides as {{a.b: value}}.")
    return [
        f"{key}={value if key == 'recipe' else json.dumps(value, ensure_ascii=False)}" for key, value in told.items()
    ]


def latest(arguments: Sequence[str]) -> list[str]:
    """Without what a later one sets again: a section that is set twice is the second one, not a mixture."""
    keys = [argument.partition("=")[0] for argument in arguments]
    return [
        argument
        for place, argument in enumerate(arguments)
        if not any(keys[place] == key or keys[place].startswith(f"{key}.") for key in keys[place + 1 :])
    ]


def listed(value: Any) -> list[str]:
    return [plain(one) for one in value] if isinstance(value, list) else [plain(value)]


def check_without(without: Any, axes: Mapping[str, Mapping[str, Any]]) -> None:
    """Every axis and label must be one of the page's: a typo would leave nothing out, silently."""
    if not isinstance(without, list) or not all(isinstance(leave, dict) and leave for leave in without):
        raise FedError("without: a list of combinations, each {axis: label, ...}.")
    for axis, label in ((axis, label) for leave in without for axis, told in leave.items() for label in listed(told)):
        if axis not in axes:
            raise FedError(f"without: {nearest(str(axis), axes, 'axis')}")
        if label not in axes[axis]:
            raise FedError(f"without: {axis}: {nearest(label, axes[axis], 'choice')}")


DONE = "finished"


def state(run: Path, recipe: Recipe) -> str:
    """Where a run stands: ``finished``, ``new``, or the round it goes on after.

    Raises:
        FedError: the folder holds a run of another recipe.
    """
    if not (run / "recipe.yaml").is_file():
        return "new"
    there = recipes.load([f"recipe={run / 'recipe.yaml'}"])  # keys that are newer than the run get their defaults
    differing = list(checkpoint.differences(recipe.page, there.page))
    if differing:
        raise FedError(
            f"{run} holds a run of another recipe: {'; '.join(differing)}. Give another --out, or remove it."
        )
    records, _ = story.records_in(run / "rounds.jsonl") if (run / "rounds.jsonl").is_file() else ([], 0)
    last = records[-1] if records else {"round": 0}
    if last["round"] >= recipe.run.rounds and summarised(run, last):
        return DONE
    return f"to resume after round {last['round']}" if records else "to resume"


def summarised(run: Path, last: Mapping[str, Any]) -> bool:
    """Whether the summary is of this last round: a longer run replaces that of a shorter one only at its end."""
    scores = story.mapping(last.get("eval"))
    rows = story.rows_of(story.json_in(run / "summary.json"))
    return any(
        str(row.get("name", "")).startswith("federated") and all(row.get(key) == value for key, value in scores.items())
        for row in rows
    )


def folder_of(sweep: Sweep) -> None:
    """Makes the sweep's folder, with the sheet that says what each run stands for."""
    out = sweep.output
    if out.exists() and any(out.iterdir()) and not (out / entries.SHEET).is_file():
        raise FedError(f"{out} holds files that are not a sweep's: give an empty or new folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    sheet = {"sweep": sweep.name, "runs": {run.name: dict(run.labels) for run in sweep.runs}}
    folder.write(out / entries.SHEET, json.dumps(sheet, indent=1))


def devices() -> list[str]:
    """The GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


def execute(sweep: Sweep, runs: Sequence[Planned], jobs: int, launch: Sequence[str]) -> list[str]:
    """Runs them, ``jobs`` at a time; the names of those that broke off.

    One at a time shows its own progress; several write to ``NAME.log`` beside their folders, and each gets its share of
    the GPUs and of the cores.
    """
    lanes: queue.Queue[str | None] = queue.Queue()
    gpus = devices()
    for lane in range(jobs):
        lanes.put(",".join(gpus[lane::jobs]) if gpus and jobs > 1 else None)
    started = time.perf_counter()

    def one(number: int, run: Planned) -> str | None:
        gpu = lanes.get()
        began = time.perf_counter()
        try:
            code = subprocess.run(
                command(sweep, run, jobs, launch),
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}),
                check=False,
                **(output(sweep, run) if jobs > 1 else {}),
            ).returncode
        finally:
            lanes.put(gpu)
        ended = "done" if code == 0 else f"BROKE OFF ({code})"
        now = time.perf_counter()
        print(
            f"[{number}/{len(runs)}] {run.name} {ended} in {span(now - began)}, {span(now - started)} in all",
            flush=True,
        )
        return None if code == 0 else run.name

    with ThreadPoolExecutor(jobs) as pool:
        ended = list(pool.map(one, range(1, len(runs) + 1), runs))
    return [name for name in ended if name is not None]


def command(sweep: Sweep, run: Planned, jobs: int, launch: Sequence[str]) -> list[str]:
    """The command line of one run; it resumes whatever is there."""
    begin = [*launch] or [sys.executable]
    out = sweep.output / run.name
    place = [f"run.output={out}", f"run.resume={str(folder.begun(out)).lower()}", "run.overwrite=false"]
    threads = [f"run.threads={max(1, len(os.sched_getaffinity(0)) // jobs)}"] if jobs > 1 else []
    return [*begin, str(TRAIN), *run.arguments, *place, *threads]


def output(sweep: Sweep, run: Planned) -> dict[str, Any]:
    stream = (sweep.output / f"{run.name}.log").open("ab")
    return {"stdout": stream, "stderr": subprocess.STDOUT}
