"""Sweeps: pages into runs, where each stands, and the runs themselves through the real command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedllm.commands import sweep
from fedllm.errors import FedError

ROOT = Path(__file__).parents[1]
PAGE = {
    "recipe": "smoke",
    "set": {"run.overwrite": False, "run.threads": 1, "worker.steps": 2, "data.train_rows": 24, "data.test_rows": 4,
            "eval.generate": False, "clients.rank": [8, 2]},
    "over": {"rule": {"hl": {"algorithm.name": "fedhl"}, "one": {"algorithm.name": "fedit", "clients.rank": [8]}},
             "run.seed": [0]},
}  # fmt: skip

DATA = {"vision": "prototypes", "cifar10": "cifar10", "wikitext2": "wikitext2"}
MIXED = ("b4", "b3", "b2")

STAND_IN = """
import json, os, sys, time
from fedllm.storage import run_folder as folder
from fedllm.recipe import page as recipe
told = recipe.load(sys.argv[2:])
out, seed = told.output, told.run.seed
(out.parent / f"here{seed}").touch()
for other in {1: [2], 2: [1]}.get(seed, []) if told.run.threads else []:  # each waits until the other runs too
    until = time.time() + 120
    while not (out.parent / f"here{other}").exists():
        if time.time() > until:
            sys.exit("alone")
        time.sleep(0.05)
if seed == 13:
    sys.exit("an unlucky seed")
out.mkdir(parents=True, exist_ok=True)
(out / "recipe.yaml").write_text(recipe.dump(told))
evals = {"loss": 1.0 / (1 + seed), "exact_match": 0.5}
records = [{"round": i, "train_loss": 1.0, "bytes_down": 1, "eval": evals} for i in range(1, told.run.rounds + 1)]
folder.write_lines(out / "rounds.jsonl", records)
(out / "summary.json").write_text(json.dumps({"rows": [{"name": "federated (x)", **evals}]}))
lane = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": told.run.threads, "pid": os.getpid()}
(out / "lane.json").write_text(json.dumps(lane))
"""


def written(tmp_path: Path, **changes) -> str:
    path = tmp_path / "page.yaml"
    path.write_text(yaml.safe_dump({**PAGE, **changes}, sort_keys=False))
    return str(path)


def fedllm(*arguments: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fedllm.cli", *map(str, arguments)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_page_loads_and_starts_with_its_command(path):
    assert path.read_text().splitlines()[0].startswith(f"# fedllm sweep {path.stem}")
    runs = sweep.load(path.stem).runs
    assert len({run.name for run in runs}) == len(runs) > 1
    for run in runs:
        assert not run.recipe.run.overwrite, "a run that is resumed is not deleted"


def test_the_demo_s_five_rules_and_two_seeds():
    runs = sweep.load("demo_rules").runs
    rules = {(run.recipe.algorithm_name, run.recipe.run.seed) for run in runs if len(run.recipe.clients.ranks()) > 1}
    assert rules == {(r, s) for r in ("fedhl", "flexlora", "flora", "zero_padding", "fedit") for s in (0, 1)}
    pooled = [run.recipe for run in runs if run.labels["rule"] == "pooled"]
    others = {run.recipe.worker.steps * len(run.recipe.clients.ranks()) for run in runs}
    assert len(pooled) == 2 and others == {24}, "all take as many steps on as many rows"
    assert {recipe.eval.alone for recipe in (run.recipe for run in runs)} == {None, "all"}


def test_the_paper_s_settings_and_what_cannot_be():
    """3 tasks x 3 seeds x (4 rules x 4 profiles, and FedIT and the pooled run once); of a hundred clients no pooled."""
    runs = sweep.load("fedhl_cross_silo").runs
    assert len(runs) == 3 * 3 * (4 * 4 + 2)
    by_rule = {r: {x.labels["profile"] for x in runs if x.labels["rule"] == r} for r in ("fedhl", "fedit", "pooled")}
    assert by_rule["fedhl"] == {"moderate", "high", "extremely high", "homogeneous"}
    assert by_rule["fedit"] == by_rule["pooled"] == {"homogeneous"}
    assert {len(x.recipe.clients.ranks()) for x in runs if x.labels["rule"] == "pooled"} == {1}
    scored = [x.labels for x in runs if x.recipe.eval.base]
    assert len(scored) == 9 and {x["rule"] for x in scored} == {"fedhl"}, "the base model once a task and seed"
    settings = {
        x.labels["task"]: (x.recipe.run.rounds, x.recipe.worker.epochs, x.recipe.worker.learning_rate,
                           x.recipe.worker.weight_decay, x.recipe.page["data"]["partition"]["name"])
        for x in runs if x.labels["rule"] != "pooled"
    }  # fmt: skip
    assert settings == {
        "GSM8K": (20, 3, 5e-4, 0.01, "iid"),
        "CodeAlpaca": (10, 1, 2e-4, 0.01, "iid"),
        "Dolly": (5, 2, 2e-4, 0.001, "dirichlet"),
    }
    device = sweep.load("fedhl_cross_device").runs
    assert len(device) == 2 * 2 * 3 * (4 * 3 + 1) and {len(x.recipe.clients.ranks()) for x in device} == {100}
    assert {x.recipe.clients.participation for x in device} == {0.15, 0.3}
    assert {(x.recipe.data_name, x.recipe.run.rounds) for x in device} == {("rosetta_alpaca", 20), ("dolly", 15)}


def test_the_orderings_of_mixed_capacities():
    """Nine rules and mixes with two seeds; of one seed, five of them on CIFAR-10 and three on WikiText-2."""
    pages = {page: sweep.load(f"{page}_capacities", ["data.path=here"] * (page != "vision")).runs for page in DATA}
    assert {page: len(runs) for page, runs in pages.items()} == {"vision": 18, "cifar10": 5, "wikitext2": 3}
    for page, runs in pages.items():
        assert {run.recipe.data_name for run in runs} == {DATA[page]}
        assert {run.recipe.clients.levels for run in runs if run.labels["rule"] == "HeteroFL 1, .75, .5"} == {MIXED}
    every = [run.recipe.algorithm.svd_every for run in sweep.load("vision_svd_interval").runs]
    assert every == [1, 1, 5, 5, 25, 25, None, None]


def test_a_rule_that_goes_by_capacity_can_be_swept(tmp_path):
    """Without alpha FedLMT reads it off the clients' levels: no level of its own is refused, one is not."""
    over = {"rule": {"lmt": {}, "b2": {"clients.levels": ["b2"]}}}
    page = {"recipe": "fedlmt_cifar10", "set": {}, "over": over}
    assert len(sweep.load(written(tmp_path, **page)).runs) == 2
    with pytest.raises(FedError, match="rule=lmt: fedlmt trains the network of the weakest client's level"):
        sweep.load(written(tmp_path, **page | {"set": {"clients.levels": ["b4"]}}))


def test_a_page_is_a_product_of_its_axes(tmp_path):
    """2 rules x 2 seeds x 2 rates, without one rule's second seed: 8 - 2 runs; later axes and the command line win."""
    over = {
        "rule": {
            "hl": {"algorithm.name": "fedhl", "worker.learning_rate": 9},
            "pad": {"algorithm.name": "zero_padding"},
        },
        "worker.learning_rate": [0.1, 0.2], "run.seed": [0, 1],
    }  # fmt: skip
    page = written(tmp_path, over=over, without=[{"rule": "pad", "run.seed": 1}], output="kept")
    made = sweep.load(page, ["worker.steps=7"])
    assert made.output == Path("kept") and made.name == "page" and len(made.runs) == 6
    assert [run.name for run in made.runs[:3]] == ["hl_0.1_seed0", "hl_0.1_seed1", "hl_0.2_seed0"]
    third = made.runs[2]
    assert third.labels == {"rule": "hl", "worker.learning_rate": "0.2", "run.seed": "0"}
    assert third.recipe.worker.learning_rate == 0.2 and third.recipe.worker.steps == 7
    assert third.recipe.clients.ranks() == [8, 2] and made.runs[-1].recipe.algorithm_name == "zero_padding"


def test_what_is_set_again_replaces_what_was_set():
    told = [
        "recipe=a",
        "data.partition={1}",
        "data.partition.eta=2",
        "x=1",
        "data.partition={3}",
        "data.partition.n=4",
        "x=2",
    ]
    assert sweep.latest(told) == ["recipe=a", "data.partition={3}", "data.partition.n=4", "x=2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"over": {}}, "the axes"),
        ({"recipe": None}, "the axes"),
        ({"ovr": {}}, "over"),
        ({"set": ["run.rounds=3"]}, "write overrides as"),
        ({"set": {"run.ronds": 3}}, "Did you mean run.rounds"),
        ({"over": {"run.seed": [0, 0]}}, "different values"),
        ({"over": {"run.seed": 3}}, "different values"),
        ({"over": {"rule": {"a": {"algorithm.name": "fedhll"}}}}, "Did you mean fedhl?"),
        ({"over": {"rule": {"a/b": {"run.seed": 1}, "a b": {"run.seed": 2}}}}, "both be called a-b"),
        ({"over": {"algorithm.name": ["fedhl", "fedit"]}}, "the run algorithm.name=fedit: "),
        ({"without": [{"rul": "hl"}]}, "Did you mean rule?"),
        ({"without": [{"rule": "h"}]}, "Did you mean hl?"),
        ({"without": ["hl"]}, "a list of combinations"),
        ({"without": [{"run.seed": 0}]}, "leaves no run"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, changes, message):
    with pytest.raises(FedError, match=message.replace("?", r"\?")) as error:
        sweep.load(written(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_no_such_page(tmp_path):
    with pytest.raises(FedError, match="Did you mean smoke"):
        sweep.load("smok")
    with pytest.raises(FedError, match="no such file"):
        sweep.load(str(tmp_path / "none.yaml"))


def test_a_sweep_end_to_end(tmp_path, capsys):
    """One run broke off after round 1: it is resumed, the other is new, and the second time both are skipped."""
    page = written(tmp_path)
    begun = sweep.load(page).runs[0]
    place = f"run.output={tmp_path / 'out/hl_seed0'}"
    half = fedllm("train", *begun.arguments, "run.rounds=1", place, cwd=tmp_path)
    assert half.returncode == 0, half.stderr
    (tmp_path / "out/hl_seed0/summary.json").unlink()
    first_round = (tmp_path / "out/hl_seed0/rounds.jsonl").read_text()
    (tmp_path / "out/sweep.json").write_text("{}")
    done = fedllm("sweep", page, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "to resume after round 1" in done.stdout and "new" in done.stdout
    resumed = (tmp_path / "out/hl_seed0/rounds.jsonl").read_text()
    assert resumed.startswith(first_round[: first_round.index('"eval"')]) and len(resumed.splitlines()) == 2
    table = (tmp_path / "out/compare/compare.md").read_text()
    assert "| hl | " in table and "_all data in one place_" in table
    assert json.loads((tmp_path / "out/sweep.json").read_text())["runs"]["one_seed0"] == {
        "rule": "one",
        "run.seed": "0",
    }
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/rounds.jsonl")}
    assert sweep.run([page], out=tmp_path / "out") == 0
    assert capsys.readouterr().out.count("finished") == 2
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/rounds.jsonl")}
    with pytest.raises(FedError, match="worker.steps is 3 now and was 2"):
        sweep.run([page, "worker.steps=3"], out=tmp_path / "out")


@pytest.fixture
def stand_in(tmp_path) -> str:
    """A program in the place of training: the launcher's words go before ``train.py``, so this takes its arguments."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return f"{sys.executable} {tmp_path / 'stand_in.py'}"


def test_several_at_a_time_share_what_there_is_and_a_broken_run_does_not_end_the_others(tmp_path, stand_in):
    page = written(tmp_path, over={"run.seed": [1, 2, 13, 4]}, set={"run.overwrite": False})
    arguments = ["sweep", page, "--out", "out", "--jobs", "2", "--launch", stand_in]
    done = fedllm(*arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES="5,7")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "seed13 BROKE OFF (1)" in done.stdout and "1 of 4 runs broke off: seed13" in done.stderr
    assert "an unlucky seed" in (tmp_path / "out/seed13.log").read_text()
    lanes = [json.loads((tmp_path / f"out/seed{seed}/lane.json").read_text()) for seed in (1, 2, 4)]
    assert {lane["gpu"] for lane in lanes} == {"5", "7"} and len({lane["pid"] for lane in lanes}) == 3
    assert {lane["threads"] for lane in lanes} == {max(1, len(os.sched_getaffinity(0)) // 2)}
    assert lanes[0]["gpu"] != lanes[1]["gpu"], "the two that waited for each other"
    assert "0.333" in (tmp_path / "out/compare/compare.md").read_text(), "the finished ones are compared"
    again = fedllm(*arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES="5,7")
    assert again.returncode == 1 and again.stdout.count("finished") == 3 and "[1/1] seed13" in again.stdout


def test_the_plan_writes_nothing(tmp_path):
    done = fedllm("sweep", written(tmp_path), "--plan", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count(" new\n") == 2 and not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("")
    done = fedllm("sweep", written(tmp_path), "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and "not a sweep's" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_summary_of_fewer_rounds_does_not_finish_a_run(tmp_path, stand_in):
    """As after a sweep of one round that was asked for three and broke off between the last round and its summary."""
    page = written(tmp_path, over={"run.seed": [1]}, set={"run.overwrite": False})
    assert fedllm("sweep", page, "--out", "out", "--launch", stand_in, cwd=tmp_path).returncode == 0
    (run,) = sweep.load(page).runs
    place = tmp_path / "out" / run.name
    assert sweep.state(place, run.recipe) == "finished"
    assert sweep.state(place, sweep.load(page, ["run.rounds=3"]).runs[0].recipe) == "to resume after round 2"
    old = json.dumps({"rows": [{"name": "federated (x)", "loss": 7.0, "exact_match": 0.5}]})
    (place / "summary.json").write_text(old)
    assert sweep.state(place, run.recipe) == "to resume after round 2"
    shutil.rmtree(place)
    assert sweep.state(place, run.recipe) == "new"
