"""The command: its spellings, its lists, its help, and how fast and how light a typo is answered."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.shell_completion import BashComplete

import fedllm
from fedllm import cli
from fedllm.algorithms import ALGORITHMS
from fedllm.commands import keys
from fedllm.config.arguments import spelled
from fedllm.config.pages import find, pages
from fedllm.data.partition import PARTITIONS
from fedllm.errors import FedError
from fedllm.evaluation.settings import Settings
from fedllm.recipe import load, sections
from fedllm.server.robust import ROBUST
from fedllm.tasks import TASKS
from fedllm.workers import WORKERS

ROOT = Path(__file__).parents[1]
TABLES: dict[str, dict[str, Any]] = {
    "algorithm": dict(ALGORITHMS),
    "data": dict(TASKS),
    "data.partition": dict(PARTITIONS),
    "worker": dict(WORKERS),
    "robust": dict(ROBUST),
}
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "matplotlib", "scipy"}


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What a command prints where it should."""
    assert cli.main(words) == code
    given = capsys.readouterr()
    assert (given.err if code == 0 else given.out) == ""
    return given.out + given.err


def settings(section: str) -> Any:
    module, name = keys.PLAIN[section]
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["smoke"], ["recipe=smoke"]),
        (["recipe=smoke", "a.b=c"], ["recipe=smoke", "a.b=c"]),
        (["smoke", "--a.b", "c", "d.e=f"], ["recipe=smoke", "a.b=c", "d.e=f"]),
        (["--a.b=c", "--recipe", "smoke"], ["a.b=c", "recipe=smoke"]),
        (["-r", "smoke", "--run.overwrite", "--run.seed", "-1"], ["recipe=smoke", "run.overwrite=true", "run.seed=-1"]),
        (["--config", "mine.yaml"], ["recipe=mine.yaml"]),
        (["smoke", "nonsense"], ["recipe=smoke", "nonsense"]),
    ],
)
def test_a_line_may_be_spelled_as_other_tools_have_it(words: Sequence[str], same: Sequence[str]) -> None:
    assert spelled(words) == same


def test_all_spellings_are_the_same_recipe() -> None:
    wanted = load(["recipe=smoke", "worker.steps=3", "run.overwrite=true"])
    assert load(["smoke", "--worker.steps", "3", "--run.overwrite"]) == wanted
    assert load(["--config", "smoke", "--worker.steps=3", "run.overwrite=true"]) == wanted


# --- the keys, from the text of the classes


@pytest.mark.parametrize("section", list(keys.PLAIN))
def test_the_keys_of_a_section_are_its_class_s(section: str) -> None:
    wanted = [field.name for field in dataclasses.fields(settings(section)) if field.init]
    assert list(keys.keys_of(section)) == wanted


@pytest.mark.parametrize(("section", "name"), [(section, name) for section, table in TABLES.items() for name in table])
def test_the_keys_of_a_name_are_its_class_s(section: str, name: str) -> None:
    wanted = {field.name for field in dataclasses.fields(TABLES[section][name]) if field.init}
    if section == "data":
        wanted |= {field.name for field in dataclasses.fields(sections.Data)} - {"task", "partition"}
    assert set(keys.keys_of(section, name)) == wanted


def test_every_section_and_name_is_known() -> None:
    assert keys.sections() == sections.SECTIONS
    assert set(keys.sections()) == set(keys.PLAIN) | set(keys.NAMED) - {"data.partition"} | {"model"}
    assert {section: set(keys.names(section)) for section in TABLES} == {s: set(table) for s, table in TABLES.items()}
    for worker, kind in WORKERS.items():
        fields = [field.name for field in dataclasses.fields(kind.model_section) if field.init]
        assert list(keys.keys_of("model", worker=worker)) == fields


def test_every_key_has_a_type_in_words_and_a_line() -> None:
    told = dict(keys.every_key())
    assert len(told) > 150
    assert [name for name, key in told.items() if not key.line] == []
    assert [name for name, key in told.items() if "[" in key.type or "Annotated" in key.type] == []


@pytest.mark.parametrize("section", ["run", "eval", "faults", "hub"])
def test_defaults_are_those_of_the_classes(section: str) -> None:
    made = settings(section)()
    for key, told in keys.keys_of(section).items():
        value = getattr(made, key)
        read = yaml.safe_load(str(told.default))
        assert (float(read) if isinstance(value, float) else read) == (
            list(value) if isinstance(value, tuple) else value
        ), key


@pytest.mark.parametrize("page", pages())
def test_a_sound_page_is_let_through(page: str) -> None:
    keys.refuse_typos([page, "run.seed=3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smok"], "no recipe of that name. Did you mean smoke?"),
        (["recipes/smoke"], "Did you mean recipes/smoke.yaml?"),
        (["smoke", "run.ronds=3"], "run.ronds is not a key of a recipe. Did you mean run.rounds?"),
        (["smoke", "--worker.step", "2"], "Did you mean worker.steps?"),
        (["smoke", "algoritm.name=fedhl"], "Did you mean algorithm.name?"),
        (["smoke", "algorithm.name=FedHL"], "Did you mean fedhl?"),
        (["smoke", "algorithm={name: flexlora, epsilon: 1}"], "algorithm.epsilon is not a key"),
        (["smoke", "data.partition.name=dirichlets"], "Did you mean dirichlet?"),
        (["smoke", "seed=3"], "Did you mean run.seed?"),
        (["smoke", "worker.lr=1e-3"], "Did you mean worker.learning_rate?"),
        (["smoke", "run.device=cpu"], "CUDA_VISIBLE_DEVICES="),
        (["smoke", "robust.name=krumm"], "no guard of that name. Did you mean krum?"),
        (["vision_smoke", "model.dtype=float32"], "model.dtype is not a key"),
    ],
)
def test_a_typo_is_answered_with_the_nearest(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(FedError) as caught:
        keys.refuse_typos(words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["smoke", "algorithm.name=./mine.py:Mine", "algorithm.anything=1"],  # another reader's to judge
        ["smoke", "algorithm.name=fedloru", "algorithm.tau=2"],
        ["smoke", "model.config.hidden_size=32"],
        ["vision_smoke", "algorithm={name: fedlmt, decay: {l2: 1}}"],
        ["recipe=smoke", "recipe=demo"],
        [],
    ],
)
def test_what_may_be_sound_is_left_to_the_reader_of_recipes(words: list[str]) -> None:
    keys.refuse_typos(words)


# --- light and fast


def fresh(*words: str) -> tuple[subprocess.CompletedProcess[str], float, set[str]]:
    """A command in a process of its own: what it said, its seconds of CPU, and the heavy modules that it imported."""
    program = (
        "import sys, json\nfrom fedllm import cli\ncode = cli.main(sys.argv[1:])\n"
        f"print('MODULES', json.dumps(sorted(set(sys.modules) & {HEAVY!r})))\nsys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done, spent, set(json.loads(done.stdout.rpartition("MODULES ")[2] or "[]"))


@pytest.mark.parametrize(
    "words",
    [
        ["train", "smoke", "run.ronds=3"],
        ["plan", "smok"],
        ["train", "smoke", "algorithm.name=fedlh"],
        ["aggregate", "fedlh", "a", "b", "--out", "c"],
        ["tain"],
    ],
)
def test_a_typo_needs_nothing_heavy(words: list[str]) -> None:
    done, seconds, heavy = fresh(*words)
    assert done.returncode == 2 and "Did you mean" in done.stderr and done.stderr.count("\n") == 1
    assert heavy == set()
    assert seconds < 1.5


@pytest.mark.parametrize("words", [["ls"], ["train", "--help"], ["--version"], ["keys"], ["evaluate", "--help"]])
def test_lists_and_help_need_nothing_heavy(words: list[str]) -> None:
    done, seconds, heavy = fresh(*words)
    assert done.returncode == 0, done.stderr
    assert heavy == set() and seconds < 1.5


# --- the small commands


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version") == f"fedllm {fedllm.__version__}\n"


def test_no_command_is_help_and_a_wrong_one_has_a_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Commands:" in said(capsys, "--help")
    assert cli.main([]) == 2
    capsys.readouterr()
    assert "tain: there is no command of that name. Did you mean train?" in said(capsys, "tain", code=2)
    assert "--target" in said(capsys, "compare", "--traget", "x", code=2)


def test_lists_name_everything(capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "ls")
    lines = [line.split(maxsplit=1) for line in told.splitlines() if line.startswith("  ")]
    assert [line for line in lines if len(line) < 2] == [], "each has a line"
    everything = [ALGORITHMS, TASKS, PARTITIONS, ROBUST, pages(), pages("sweeps")]
    assert {name for table in everything for name in table} == {line[0] for line in lines}
    assert said(capsys, "ls", "tasks").startswith("tasks:") and "Did you mean" in said(capsys, "ls", "task", code=2)


def test_help_has_every_key_with_its_type_default_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "train", "--help")
    for name, key in keys.every_key():
        assert f"  {name}  [{key.type}]" in told, name
    assert "run.rounds  [a whole number from 1 up]  default: 1\n      communication rounds" in told
    assert said(capsys, "keys", "run.ro").count("\n  run.") == 1
    evaluation = said(capsys, "evaluate", "--help")
    assert all(f"  {field.name}  [" in evaluation for field in dataclasses.fields(Settings))


def test_a_page_is_copied_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    assert f"fedllm train {mine}" in said(capsys, "cp", "smoke", str(mine))
    assert mine.read_bytes() == find("smoke").read_bytes()
    assert "is there already" in said(capsys, "cp", "smoke", str(mine), code=2)
    assert "fedllm sweep" in said(capsys, "cp", "--sweep", "smoke", str(mine), "--force")
    assert "ends in .yaml" in said(capsys, "cp", "smoke", str(tmp_path / "mine.txt"), code=2)
    assert "Did you mean smoke?" in said(capsys, "cp", "smok", str(tmp_path / "x.yaml"), code=2)


def test_a_new_page_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    words = ["new", str(mine), "--model", "a: model", "--data", "alpaca", "--ranks", "16,8,4", "--rule", "flexlora"]
    assert "fedllm plan" in said(capsys, *words)
    made = load([f"recipe={mine}"])
    assert made.clients.ranks() == [16, 8, 4] and made.algorithm_name == "flexlora" and made.model.name == "a: model"
    assert made.data_name == "alpaca"
    assert "is there already" in said(capsys, *words, code=2)
    mine.unlink()
    assert "give a whole number" in said(capsys, *words[:6], "--ranks", "a,b", "--rule", "fedhl", code=2)
    assert "Did you mean flexlora?" in said(capsys, *words[:-1], "flexlor", code=2)
    assert not mine.exists(), "a page that no recipe takes is not left behind"


def test_new_asks_for_what_is_not_said(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    command = [sys.executable, "-m", "fedllm.cli", "new", str(mine), "--rule", "fedit"]
    answers = "pico\ngsm8k\n4,4\n"
    done = subprocess.run(command, check=False, cwd=ROOT, input=answers, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert load([f"recipe={mine}"]).clients.ranks() == [4, 4]


def test_the_environment_says_versions_and_no_machine(capsys: pytest.CaptureFixture[str]) -> None:
    told = dict(line.split(maxsplit=1) for line in said(capsys, "env").splitlines())
    assert told["fedllm"] == fedllm.__version__ and told["torch"][0].isdecimal()
    assert os.uname().nodename not in " ".join(told.values())


def completed(*words: str) -> list[str]:
    """What bash would offer for the last word."""
    found = BashComplete(cli.command, {}, "fedllm", "_FEDLLM_COMPLETE")
    return [item.value for item in found.get_completions(list(words[:-1]), words[-1])]


def test_words_are_completed() -> None:
    assert completed("pl") == ["plan"]
    assert completed("train", "smo") == ["smoke"]
    assert completed("train", "smoke", "run.ro") == ["run.rounds="]
    assert completed("train", "smoke", "--worker.sche") == ["--worker.schedule"]
    assert "algorithm.name=fedhl" in completed("train", "smoke", "algorithm.name=fedh")
    assert completed("train", "smoke", "algorithm.name", "=", "fedhl") == ["fedhl"], "bash breaks words at ="
    assert completed("train", "smoke", "worker.schedule=c") == ["worker.schedule=constant", "worker.schedule=cosine"]
    assert completed("aggregate", "flexl") == ["flexlora"]
    assert completed("cp", "vision") == ["vision_smoke"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"_FEDLLM_COMPLETE={shell}_complete" in said(capsys, "completion", shell)


# --- a sweep without a page


def test_a_sweep_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["recipe=smoke", "over.algorithm.name=[fedhl,flexlora]", "--over.run.seed", "[0,1,2]", "worker.steps=3"]
    to = ["--plan", "--out", str(tmp_path / "out")]
    told = said(capsys, "sweep", *line, *to)
    assert [row.split() for row in told.splitlines()] == [
        [f"{rule}_seed{seed}", "new"] for rule in ("fedhl", "flexlora") for seed in range(3)
    ]
    assert len(said(capsys, "sweep", *line, "without=[{run.seed: 2}]", *to).splitlines()) == 4
    more = said(capsys, "sweep", "smoke", "over.run.seed=[0,1]", *to)
    assert len(more.splitlines()) == 6, "an axis of the line replaces the page's"
    assert "which sweep?" in said(capsys, "sweep", "worker.steps=3", code=2)
    assert "over.run.seed" in said(capsys, "sweep", "recipe=smoke", "over.run.seed=3", code=2)
