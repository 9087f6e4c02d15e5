"""All processes on one client at a time, with copies or shards of the base model: the same training, to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedllm.errors import FedError
from fedllm.recipe import page as recipes
from fedllm.workers.settings import SFT

ROOT = Path(__file__).parents[1]
TINY = [
    "recipe=smoke", "run.output=run", "run.threads=1", "data.train_rows=200", "data.test_rows=4", "clients.count=4",
    "worker.steps=2", "worker.batch_size=4", "worker.accumulation=2", "worker.optimizer=kept", "eval.max_new_tokens=4",
    "algorithm={name: mfedloru, tau: 1}", "eval.alone=3",
]  # fmt: skip


def launch(size: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], list[dict], list[dict]]:
    """The adapter's products; what each client trained on; the scores."""
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    products = {name: adapter[name.replace("lora_A", "lora_B")] @ A for name, A in adapter.items() if "lora_A" in name}
    rounds = [json.loads(line)["clients"] for line in (run / "rounds.jsonl").read_text().splitlines()]
    trained = [{id: (client["tokens"], client["steps"]) for id, client in clients.items()} for clients in rounds]
    return products, trained, json.loads((run / "summary.json").read_text())["rows"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = launch(1, folder, str(ROOT / "fedllm/train.py"), *TINY)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_one_client_as_one_does(parallel: str, alone: Path, tmp_path: Path) -> None:
    """Nested factors, a frozen update, kept moments, generation and a client alone: the same tokens, the same sums."""
    done = launch(2, tmp_path, str(ROOT / "fedllm/train.py"), *TINY, f"run.parallel={parallel}")
    assert done.returncode == 0, done.stderr
    (products, trained, rows), (expected, seen, scores) = outcome(tmp_path / "run"), outcome(alone)
    assert trained == seen and len(rows) == len(scores) == 3
    for name, product in expected.items():
        assert float((products[name] - product).norm() / product.norm()) < 1e-4
    for row, score in zip(rows, scores, strict=True):
        assert row["loss"] == pytest.approx(score["loss"], rel=1e-4)
    assert sum(line.startswith("round ") for line in done.stdout.splitlines()) == 2  # one process speaks


def test_a_shard_is_a_half(tmp_path: Path) -> None:
    """Each of two processes holds half of every weight."""
    program = tmp_path / "shards.py"
    program.write_text(
        "import torch\n"
        "from fedllm.models.language import LanguageModel, load\n"
        "torch.distributed.init_process_group('gloo')\n"
        "model = load(LanguageModel('pico'), torch.device('cpu'), 0, shards=2)\n"
        "assert not any(p.requires_grad for p in model.parameters())\n"
        "held = sum(p.to_local().numel() for p in model.parameters())\n"
        "print(held / sum(p.numel() for p in model.parameters()), flush=True)\n"
        "torch.distributed.destroy_process_group()\n"
    )
    done = launch(2, tmp_path, str(program))
    assert done.returncode == 0, done.stdout + done.stderr
    shares = [float(share) for share in done.stdout.split()]
    assert sum(shares) == pytest.approx(1.0) and max(shares) < 0.51  # 259 tokens are no even number


def test_a_step_s_rows_are_shared_out() -> None:
    """4 rows x 6 passes: two processes take 3 passes each, three 2; four cannot, and take a row each."""
    settings = SFT(batch_size=4, accumulation=6)
    assert [settings.shared(n) for n in (1, 2, 3, 4)] == [(4, 6), (4, 3), (4, 2), (1, 6)]
    with pytest.raises(FedError, match="5 processes cannot share.*worker.batch_size=4 x worker.accumulation=6"):
        settings.shared(5)


def test_a_mistake_is_said_once_and_before_anything_is_loaded(tmp_path: Path) -> None:
    arguments = [*TINY, "run.parallel=ddp", "worker.batch_size=3", "worker.accumulation=1"]
    done = launch(2, tmp_path, str(ROOT / "fedllm/train.py"), *arguments)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert done.stderr.count("multiple of 2") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe=vision_smoke", "run.parallel=ddp"], "run.parallel=clients"),
        (["recipe=smoke", "run.parallel=fsdp", "model.quantization=4bit"], "model.quantization=none"),
    ],
)
def test_what_cannot_be_spread_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(FedError, match=said):
        recipes.load(arguments)
