"""Whole runs through the real command line, on the pico model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fedllm import train
from fedllm.algorithms import FedIT
from fedllm.core import Client, Model
from fedllm.fleets.local import Local
from fedllm.progress import Silent
from fedllm.storage import run_folder as folder

ROOT = Path(__file__).parents[1]
QUICK = ["run.threads=1", "worker.steps=2", "data.train_rows=24", "data.test_rows=4", "eval.max_new_tokens=4"]


def fedllm(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "fedllm.cli", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def records(run: Path) -> list[dict]:
    """rounds.jsonl without what a clock said."""
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
        for client in row["clients"].values():
            client.pop("seconds")
    return rows


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The smoke recipe, launched by path as the README says, four short rounds."""
    folder = tmp_path_factory.mktemp("straight")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1",
         "--mixed_precision=no",
         "--dynamo_backend=no", str(ROOT / "fedllm/train.py"), "recipe=smoke", "run.rounds=4", "run.output=run", *QUICK,
         "eval.clients=true", "eval.alone=0"],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_writes_what_the_contract_says(straight):
    for name in (
        "recipe.yaml",
        "rounds.jsonl",
        "partition.json",
        "summary.json",
        "report.md",
        "adapter/adapter_config.json",
    ):
        assert (straight / name).is_file(), name
    assert list((straight / "plots").glob("*.png")) and list((straight / "checkpoint").iterdir())
    rows = records(straight)
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert sum(row["weights"].values()) == pytest.approx(1)
        assert set(row["weights"]) == set(row["truncation_error"]) == {"c0", "c1", "c2", "c3"}
        assert row["bytes_down"] == sum(client["bytes_down"] for client in row["clients"].values())
        assert set(row["eval"]) == {"loss", "exact_match", "exact_match_flexible", "exact_match_published"}
    generated = [json.loads(line) for line in (straight / "eval/round_0004.jsonl").read_text().splitlines()]
    assert len(generated) == 4 and {"prompt", "generated", "target", "exact_match"} <= set(generated[0])
    names = [row["name"] for row in json.loads((straight / "summary.json").read_text())["rows"]]
    assert names[:2] == ["base model", "federated (fedhl)"] and names[-1] == "client c0 alone" and len(names) == 7


def test_the_adapter_loads_in_plain_peft_and_serves_the_run_s_loss(straight):
    """The exported folder on the same base model has the held-out loss of the last round."""
    from peft import PeftModel

    from fedllm.federation.text import TextFederation
    from fedllm.models.inference import held_out_loss
    from fedllm.models.language import load as load_model
    from fedllm.recipe import load

    recipe = load([f"recipe={straight / 'recipe.yaml'}"])
    federation = TextFederation(recipe)
    base = load_model(recipe.model, torch.device("cpu"), recipe.run.seed)
    model = PeftModel.from_pretrained(base, str(straight / "adapter")).eval()
    loss = held_out_loss(model, federation.scored, federation.tokenizer.pad_token_id, recipe.eval.batch_size)
    assert loss == pytest.approx(records(straight)[-1]["eval"]["loss"], rel=1e-5)


def test_a_resumed_run_is_the_straight_run_to_the_bit(straight, tmp_path):
    """Stopped after round 2 by asking for no more, then resumed to 4."""
    arguments = ["recipe=smoke", "run.output=run", *QUICK, "eval.clients=true", "eval.alone=0"]
    first = fedllm("train", *arguments, "run.rounds=2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = fedllm("train", *arguments, "run.rounds=4", "run.resume=true", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    expected, got = records(straight), records(tmp_path / "run")
    assert [row["round"] for row in got] == [1, 2, 3, 4] and got == expected
    ours = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    theirs = load_file(straight / "adapter/adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    other = fedllm("train", *arguments, "run.rounds=5", "run.resume=true", "worker.learning_rate=1", cwd=tmp_path)
    assert other.returncode == 2 and "worker.learning_rate is 1.0 now and was 0.005" in other.stderr


@pytest.mark.parametrize("rule", ["fedit", "zero_padding", "flexlora", "flora"])
def test_the_other_rules_run(rule, tmp_path):
    ranks = "clients.rank=[4,4]" if rule == "fedit" else "clients.rank=[8,2]"
    done = fedllm("train", "recipe=smoke", f"algorithm={{name: {rule}}}", ranks, "run.output=run",
                  "run.rounds=2", *QUICK,
                  "eval.generate=false", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(records(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=smoke", "run.ronds=3"], "Did you mean run.rounds?"),
        (["recipe=smoke", "run.rounds=x"], "run.rounds='x'"),
        (["recipe=smoke", "algorithm.name=fedhll"], "Did you mean fedhl?"),
        (["recipe=smoke", "data={name: gsm8k, path: nowhere.jsonl}"], "nowhere.jsonl"),
        (["recipe=smoke", "data={name: gsm8k, path: empty}"], "empty"),
        (["recipe=smoke", "clients.rank=[65,4]"], "client c0 has rank 65"),
        (["recipe=smoke", "data.train_rows=3"], "rows"),
        (["recipe=smoke", "worker.max_length=8"], "raise it"),
        (["recipe=smoke", "worker.targets=[q_projj]"], "has no linear module"),
        (["recipe=smoke", "model.name=./nothing"], "there is nothing there"),
        (["recipe=fedit_gsm8k", "clients.rank=high"], "averages factors, so all clients need one rank"),
        (["recipe=smoke", "run.output=taken"], "not a run's"),
        (["recipe=smoke", "run.output=taken/mine.txt/run"], "mine.txt, and that is no folder"),
        (["recipe=smoke", "run.output=old"], "old holds .git, thesis.tex beside a run"),
        (["recipe=smoke", "run.output=old", "run.resume=true"], "has rounds and no checkpoint"),
        (["recipe=smoke", "worker.targets=[]"], "worker.targets is empty"),
        (["recipe=smoke", "worker.targets=[lm_head]"], "no linear module 'lm_head'"),
        (["recipe=smoke", "model.config.num_attention_heads=7"], "model.name=pico"),
        (["recipe=smoke", "data.test_rows=0"], "test"),
        (["recipe=smoke", "data={name: gsm8k, path: no_test}"], "no_test"),
        (["recipe=smoke", "run.tracker=wandb"], "pip install wandb"),
        (["recipe=smoke", "hub.repo=nope"], "'nope' is no repository's name"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_writes_nothing(arguments, message, tmp_path):
    (tmp_path / "empty").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"empty/{split}.jsonl").write_text("")
    (tmp_path / "no_test").mkdir()
    row = '{"question": "1 + 1?", "answer": "2\\n#### 2"}\n'
    (tmp_path / "no_test/train.jsonl").write_text(row * 40)
    (tmp_path / "no_test/test.jsonl").write_text("")
    (tmp_path / "old/.git").mkdir(parents=True)
    for name in ("partition.json", "recipe.yaml", "thesis.tex"):
        (tmp_path / "old" / name).write_text("{}")
    (tmp_path / "old/rounds.jsonl").write_text('{"round": 1}\n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("")
    before = sorted(path for path in tmp_path.rglob("*"))
    done = fedllm("train", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_finished_run_is_not_overwritten_unasked(straight):
    done = fedllm("train", "recipe=smoke", "run.overwrite=false", f"run.output={straight}", cwd=straight.parent)
    assert done.returncode == 2 and "run.resume=true" in done.stderr


def test_a_run_is_not_made_shorter(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    asked = [f"recipe={straight / 'recipe.yaml'}", f"run.output={tmp_path / 'run'}", "run.resume=true", "run.rounds=1"]
    done = fedllm("train", *asked, cwd=tmp_path)
    assert done.returncode == 2 and "it cannot be made shorter" in done.stderr, done.stderr
    assert records(tmp_path / "run") == records(straight)


def test_two_processes_do_not_write_one_run(tmp_path):
    with folder.held(tmp_path / "run"):
        done = fedllm("train", "recipe=smoke", *QUICK, f"run.output={tmp_path / 'run'}", cwd=tmp_path)
        assert done.returncode == 2 and "another process is writing" in done.stderr
        assert not list((tmp_path / "run").iterdir())


def test_overwriting_removes_a_run_s_own_files_and_no_others(tmp_path):
    """A file that came after the check stays."""
    (tmp_path / "checkpoint").mkdir()
    for name in (folder.MARK, "recipe.yaml", "rounds.jsonl", "mine.txt"):
        (tmp_path / name).write_text("old")
    folder.prepare(tmp_path, "new", {}, overwrite=True)
    made = ["eval", "mine.txt", folder.MARK, "plots", "recipe.yaml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made
    assert (tmp_path / "recipe.yaml").read_text() == "new"


def test_a_client_alone_trains_in_the_rounds_it_took_part_in(monkeypatch):
    """Compared with a federation that drew it in two rounds of four, it trains in those two; never drawn, in none."""
    trained = []

    class Worker:
        steps = 1

        def of(self, client):
            return self

        def train(self, sent, memory, rnd):
            trained.append((rnd.index, int(memory.get("turns", 0))))
            return sent, {"turns": torch.tensor(len(trained))}, {"train_loss": 1.0}

    model = Model({"w": torch.empty(4, 3, device="meta")})
    federation = SimpleNamespace(alone=FedIT(), model=model)
    recipe = SimpleNamespace(run=SimpleNamespace(seed=0), output=None)
    records = [{"round": i, "clients": {"a": {}} if i in (2, 4) else {"b": {}}} for i in (1, 2, 3, 4)]
    monkeypatch.setattr(train, "_score", lambda *args: {"loss": 0.5})

    def alone(id):
        return train._alone(recipe, federation, Worker(), Local(Silent()), Silent(), Client(id, 5, 2), records)

    assert alone("a") == [{"name": "client a alone", "loss": 0.5}]
    assert trained == [(2, 0), (4, 1)]  # the rounds' own numbers, and what it remembered
    assert alone("c") == [] and len(trained) == 2


def test_a_damaged_checkpoint_falls_back_to_the_one_before(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    newest = sorted((tmp_path / "run/checkpoint").iterdir())[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    done = fedllm("train", f"recipe={tmp_path / 'run/recipe.yaml'}", f"run.output={tmp_path / 'run'}",
                  "run.overwrite=false",
                  "run.resume=true", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "run") == records(straight)


def test_plan_prints_and_writes_nothing(tmp_path):
    done = fedllm("plan", "recipe=smoke", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [client["rank"] for client in plan["clients"]] == [16, 8, 4, 2]
    assert plan["clients"][0]["scale"] == 2.0 and plan["totals"]["rows"] == 80
    shown = fedllm("train", "recipe=smoke", "run.plan=true", cwd=tmp_path)
    assert shown.returncode == 0 and "c3" in shown.stdout and not list(tmp_path.iterdir())


def test_the_plan_of_a_7b_model_needs_neither_hub_nor_account(tmp_path):
    done = fedllm("plan", "recipe=fedhl_gsm8k", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    # 64 modules of 4096 x 4096: a rank costs 2 * 4096 numbers in each
    assert [c["trainable_parameters"] for c in plan["clients"]] == [
        64 * 2 * 4096 * r for r in (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
    ]


def test_plan_s_bytes_are_the_run_s(straight, tmp_path):
    plan = json.loads(fedllm("plan", f"recipe={straight / 'recipe.yaml'}", "--json", cwd=tmp_path).stdout)
    first = records(straight)[0]["clients"]
    for client in plan["clients"]:
        for key in ("bytes_down", "bytes_up", "steps"):
            assert client[key] == first[client["id"]][key]
