"""Evaluations of a model, a PEFT folder and a run, through the documented commands where that matters."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from fedllm.cli import main as fedllm
from fedllm.errors import FedError
from fedllm.evaluation import run as evaluation
from fedllm.evaluation.run import evaluate
from fedllm.evaluation.settings import Settings
from fedllm.evaluation.statistics import interval
from fedllm.lowrank import LowRank
from fedllm.models import language
from fedllm.models.inference import Sampling, continue_batch, generate
from fedllm.models.language import LanguageModel
from fedllm.storage import peft_folder as adapters
from tests.test_alpaca import by_hand

ROOT = Path(__file__).parents[1]
DOLLY = [
    {"instruction": f"Say {i}.", "context": "x" * i, "response": f"word {i}", "category": "ab"[i % 2]}
    for i in range(10)
]
MATHS = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(12)]
QUICK = ["model=pico", "max_new_tokens=6", "batch_size=4", "resamples=50", "threads=1"]


@pytest.fixture
def maths(tmp_path) -> str:
    folder = tmp_path / "maths"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MATHS))
    return str(folder)


@pytest.fixture
def dolly(tmp_path) -> str:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOLLY))
    return str(tmp_path / "test.jsonl")


def read(out: Path) -> tuple[dict, list[dict]]:
    lines = (out / "generations.jsonl").read_text().splitlines()
    return json.loads((out / "result.json").read_text()), [json.loads(line) for line in lines]


def test_the_result_is_the_mean_of_the_raw_scores_with_an_interval_around_it(dolly, tmp_path):
    out = evaluate("dolly", [*QUICK, f"data.path={dolly}", f"output={tmp_path / 'out'}"])
    result, lines = read(out)
    assert len(lines) == 10 and [line["row"] for line in lines] == list(range(10))
    for line in lines:
        assert line["rouge_l"] == pytest.approx(by_hand(line["generated"].split("\n### ")[0], line["target"]))
    found = result["metrics"]["rouge_l"]
    assert found["value"] == pytest.approx(np.mean([line["rouge_l"] for line in lines])) and found["rows"] == 10
    assert found["low"] <= found["value"] <= found["high"]
    nats, tokens = sum(line["loss_nats"] for line in lines), sum(line["loss_tokens"] for line in lines)
    assert result["metrics"]["loss"]["value"] == pytest.approx(nats / tokens)
    groups = result["groups"]
    assert groups["by"] == "category" and groups["a"]["rouge_l"]["rows"] == groups["b"]["rouge_l"]["rows"] == 5
    settings = result["settings"]
    assert settings["generation"]["max_new_tokens"] == 6 and settings["model"]["name"] == "pico"
    assert settings["rows"]["scored"] == 10 and "rouge_score" in settings["task"]["extraction"]


def test_an_evaluation_that_was_cut_off_goes_on_to_the_same_result(maths, tmp_path):
    arguments = [*QUICK, f"data.path={maths}", "samples=2", "k=[1]"]
    straight = read(evaluate("gsm8k", [*arguments, f"output={tmp_path / 'a'}"]))
    out = evaluate("gsm8k", [*arguments, f"output={tmp_path / 'b'}"])
    part = out / "parts" / "0.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    assert len(lines) == 9  # 3 batches of the loss, 3 of each sample
    part.write_text("".join(lines[:4]) + lines[4][:20])  # in the middle of a line
    (out / "result.json").unlink()
    resumed = read(evaluate("gsm8k", [*arguments, f"output={tmp_path / 'b'}"]))
    assert resumed[1] == straight[1] and resumed[0]["metrics"] == straight[0]["metrics"]
    assert resumed[0]["resumed_batches"] == 4


def test_other_settings_do_not_mix_with_what_is_there(maths, tmp_path):
    arguments = [*QUICK, f"data.path={maths}", f"output={tmp_path / 'a'}"]
    out = evaluate("gsm8k", arguments)
    with pytest.raises(FedError, match="another generation: give another output=FOLDER, or overwrite=true"):
        evaluate("gsm8k", [*arguments, "max_new_tokens=3"])
    with pytest.raises(FedError, match="another rows"):
        evaluate("gsm8k", [*arguments, "rows=5"])
    evaluate("gsm8k", [*arguments, "confidence=0.5"])  # only scored again
    assert read(out)[0]["resumed_batches"] == 6
    evaluate("gsm8k", [*arguments, "max_new_tokens=3", "overwrite=true"])
    assert read(out)[0]["settings"]["generation"]["max_new_tokens"] == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FedError, match="not an evaluation's"):
        evaluate("gsm8k", [*QUICK, f"data.path={maths}", f"output={tmp_path / 'mine'}"])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_an_adapter_is_what_plain_peft_makes_of_it(maths, tmp_path):
    base = LanguageModel("pico")
    model = language.load(base, torch.device("cpu"), 0)
    shapes = {name: module.weight.shape for name, module in model.named_modules() if name.endswith("q_proj")}
    draw = torch.Generator().manual_seed(1)
    update = {
        name: LowRank(torch.randn(s[0], 2, generator=draw), torch.randn(2, s[1], generator=draw))
        for name, s in shapes.items()
    }
    adapters.write(tmp_path / "adapter", update, base_model="pico", targets=("q_proj",))
    arguments = [f"data.path={maths}", "max_new_tokens=8", "batch_size=12", "threads=1"]
    out = evaluate("gsm8k", [f"adapter={tmp_path / 'adapter'}", *arguments, f"output={tmp_path / 'a'}"])
    bare = evaluate("gsm8k", ["model=pico", *arguments, f"output={tmp_path / 'b'}"])
    for name, product in update.items():
        model.get_submodule(name).weight.data += product.dense()
    lines = read(out)[1]
    expected = generate(
        model, language.tokenizer(base), [line["prompt"] for line in lines], max_new_tokens=8, batch_size=12,
        stop=("Question:",),
    )  # fmt: skip
    assert [line["generated"] for line in lines] == expected
    assert [line["generated"] for line in read(bare)[1]] != expected
    assert read(out)[0]["settings"]["adapter"]["sha256"] and read(bare)[0]["settings"]["adapter"] is None


def test_pass_at_k_is_human_evals_estimate(monkeypatch, tmp_path):
    """Two problems, four answers each, 1 and 0 right: pass@1 = 1/8, pass@2 = (1 - C(3,2)/C(4,2)) / 2 = 1/4."""
    from fedllm.tasks.code import HumanEval

    def score_all(self, generated, rows, accept_missing=()):
        assert len(generated) == 8
        return [{"pass_at_1": float(i == 2), "pass_at_1_fenced": 0.0, "outcome": "told"} for i in range(8)]

    monkeypatch.setattr(HumanEval, "score_all", score_all)
    monkeypatch.setattr(evaluation, "require", lambda accepted: {})
    arguments = [*QUICK, "rows=2", "samples=4", "k=[1,2]", f"output={tmp_path / 'a'}"]
    with pytest.raises(FedError, match="allow_code_execution=true"):
        evaluate("humaneval", arguments)
    result, lines = read(evaluate("humaneval", [*arguments, "allow_code_execution=true"]))
    assert result["metrics"]["pass_at_1"]["value"] == pytest.approx(1 / 8)
    assert result["metrics"]["pass_at_2"]["value"] == pytest.approx(1 / 4)
    assert len({line["generated"] for line in lines if line["row"] == 0}) > 1  # drawn, not repeated
    assert result["settings"]["sandbox"]["wall_seconds"] == 10.0


def test_the_interval_covers_as_it_says():
    """Coin flips: over 200 experiments, the 90 % interval of 60 flips holds the truth in roughly nine of ten."""
    settings, draw = Settings(confidence=0.9, resamples=300), np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = interval(draw.integers(2, size=60).astype(float), np.ones(60), settings)
        hits += found["low"] <= 0.5 <= found["high"]
    assert 165 <= hits <= 195


def test_generation_stops_early_only_where_the_answer_has_ended():
    base = LanguageModel("pico")
    model, tokenizer = language.load(base, torch.device("cpu"), 0), language.tokenizer(base)
    prompts = ["one", "another one", "a third"]
    free = generate(model, tokenizer, prompts, max_new_tokens=40, batch_size=3)
    stop = free[0][5:8]
    ended = generate(model, tokenizer, prompts, max_new_tokens=40, batch_size=3, stop=(stop,))
    for a, b in zip(free, ended, strict=True):
        assert a.startswith(b) and a.split(stop)[0] == b.split(stop)[0]
    assert len(ended[0]) < len(free[0])


def test_sampling_is_by_its_seed_and_leaves_the_global_generator_alone():
    base = LanguageModel("pico")
    model, tokenizer = language.load(base, torch.device("cpu"), 0), language.tokenizer(base)
    ids = tokenizer(["one", "two"])["input_ids"]
    before = torch.random.get_rng_state()
    one, again, other = (continue_batch(model, tokenizer, ids, 12, (), Sampling(1.0, 1.0, seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=pico", "rws=3"], "rws is not a key.*Did you mean rows"),
        (["model=pico", "rows=many"], "fedllm: rows='many': give a whole number from 1 up, or null"),
        (["model=pico", "rows=0"], "fedllm: rows=0: give a whole number from 1 up, or null"),
        (["model=pico", "samples=2", "k=[3]"], r"k=\[3\]"),
        (["model=pico", "data.pth=x"], "data.pth is not a key"),
        (["model=pico", "data.path=/none/such"], "data.path=/none/such does not exist"),
        (["pico"], "'pico' is not understood"),
        ([], "what is to be scored"),
        (["run=none"], "run=none is not a run's folder"),
        (["adapter=none"], "adapter=none is not a PEFT folder"),
        (["run=none", "model=pico"], "give it alone"),
        (["model=pico", "backend=vllm"], "vLLM is not installed"),
        (["model=pico", "confidence=2"], "confidence=2"),
        (["model=pico", "k=1"], r"fedllm: k=1: give a list, \[1\]"),
        (["model=pico", "samples=2", "temperature=0"], "fedllm: temperature=0.0: more than 0"),
    ],
)
def test_a_mistake_is_one_sentence_and_2(arguments, says, maths, tmp_path, capsys):
    if "model=pico" in arguments and not any(a.startswith("data.") for a in arguments):
        arguments = [*arguments, f"data.path={maths}"]
    assert (
        evaluation.command("gsm8k", [*arguments, f"output={tmp_path / 'x'}"] if arguments != ["pico"] else arguments)
        == 2
    )
    said = capsys.readouterr().err
    assert said.startswith("fedllm: ") and said.count("\n") == 1 and re.search(says, said), said


def test_vllm_gets_the_same_batches(monkeypatch, maths, tmp_path):
    """A stand-in for vLLM that answers with the right number, and keeps what it was asked."""
    asked = {}

    class LLM:
        def __init__(self, **options):
            asked["options"] = options

        def generate(self, prompts, how, lora_request, use_tqdm):
            asked.setdefault("how", []).append(how)
            number = [int(prompt.split()[3]) + 1 for prompt in prompts]
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=f" #### {n}")]) for n in number]

    vllm = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **options: options
    lora = types.ModuleType("vllm.lora.request")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", lora)
    out = evaluate("gsm8k", [*QUICK, "backend=vllm", f"data.path={maths}", f"output={tmp_path / 'v'}"])
    assert read(out)[0]["metrics"]["exact_match"]["value"] == 1
    assert "loss" not in read(out)[0]["metrics"]
    assert asked["options"]["model"] == "pico" and len(asked["how"]) == 3
    assert asked["how"][0]["temperature"] == 0.0 and asked["how"][0]["stop"] == ["Question:"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "smoke"
    quick = ["run.threads=1", "worker.steps=2", "data.train_rows=24", "data.test_rows=6", "eval.max_new_tokens=12"]
    assert fedllm(["train", "recipe=smoke", "run.rounds=1", f"run.output={folder}", *quick]) == 0
    return folder


def test_a_run_is_scored_again_to_what_it_reported(run, capsys):
    """`fedllm evaluate RUN`: the exported adapter, through plain PEFT, says what the run's own model said."""
    arguments = ["max_new_tokens=12", "batch_size=32", "max_length=400", "threads=1"]
    assert fedllm(["evaluate", str(run), *arguments]) == 0
    result, lines = read(run / "eval" / "word_problems")
    reported = [json.loads(line) for line in (run / "eval" / "round_0001.jsonl").read_text().splitlines()]
    assert {line["generated"] for line in lines} == {line["generated"] for line in reported}
    own = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])["eval"]
    assert result["metrics"]["loss"]["value"] == pytest.approx(own["loss"], abs=1e-4)
    assert "word_problems" in capsys.readouterr().out


def test_two_processes_write_what_one_writes(maths, tmp_path):
    """Through the documented command, and on the CPU, where `accelerate launch` starts one, torchrun's for two."""
    one = ["accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    two = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for processes, launch in ((1, [*one, "--dynamo_backend=no"]), (2, two)):
        script = [str(ROOT / "eval" / "gsm8k.py"), *QUICK, "samples=2", f"data.path={maths}", f"output=out{processes}"]
        command = [sys.executable, "-m", *launch, *script]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    (first, lines), (second, others) = read(tmp_path / "out1"), read(tmp_path / "out2")
    assert lines == others and first["metrics"] == second["metrics"]
    parts = sorted(path.name for path in (tmp_path / "out2" / "parts").iterdir())
    assert parts == ["0.jsonl", "1.jsonl"]
