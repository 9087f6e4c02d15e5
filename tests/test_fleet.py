"""Clients over processes: as many as there are, the result is the same to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from fedllm.algorithms.lora.fedit import FedIT
from fedllm.core import Client, Failed, Job, Reply, Round
from fedllm.data.encoding import encode
from fedllm.errors import FedError
from fedllm.fleets.local import Local
from fedllm.fleets.multiprocess import Accelerate, serve, spread
from fedllm.fleets.processes import Processes, joined
from fedllm.fleets.train_client import attempt
from fedllm.lowrank import LowRank, fill
from fedllm.models.language import LanguageModel, tokenizer
from fedllm.models.language import load as load_model
from fedllm.progress import Silent
from fedllm.wire.messages import pack, unpack
from fedllm.wire.serialization import digest
from fedllm.workers.settings import SFT
from fedllm.workers.sft import SFTWorker

ROOT = Path(__file__).parents[1]
TINY = [
    "recipe=smoke", "run.output=run", "run.threads=1", "worker.steps=null", "data.train_rows=40", "data.test_rows=4",
    "eval.generate=false", "worker.optimizer=kept", "worker.dropout=0.1",
    "data.partition={name: by_rank}",
]  # fmt: skip


def launch(size: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The recipe on ``size`` processes, as torchrun and ``accelerate launch`` start them."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return subprocess.run(
        [*command, str(ROOT / "fedllm/train.py"), *TINY, *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def outcome(run: Path) -> tuple[bytes, list[dict]]:
    """The adapter's bytes, and rounds.jsonl without what a clock said."""
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
        for client in row["clients"].values():
            del client["seconds"]
    return (run / "adapter/adapter_model.safetensors").read_bytes(), rows


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, without a launcher."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, str(ROOT / "fedllm/train.py"), *TINY]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_the_same_run_to_the_bit(size: int, alone: Path, tmp_path: Path) -> None:
    """Four clients of ranks 16, 8, 4, 2 with unequal data, dropout, kept optimizers: same adapter, same records."""
    done = launch(size, tmp_path)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "run") == outcome(alone)
    manifest = (tmp_path / "run/checkpoint/round_0002/checkpoint.json").read_text()
    assert json.loads(manifest.partition("\n")[2])["clients"] == ["c0", "c1", "c2", "c3"]  # their optimizers came back
    assert sum(line.startswith("round ") for line in done.stdout.splitlines()) == 2  # one process speaks


def test_a_mistake_is_said_once_by_one_process(tmp_path: Path) -> None:
    done = launch(2, tmp_path, "data={name: gsm8k, path: nowhere.jsonl}", "data.partition={name: iid}")
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert done.stderr.count("fedllm: ") == 1 and "nowhere.jsonl" in done.stderr


def products(seed: int) -> dict[str, Tensor | LowRank]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {"q": LowRank(draw(4, 2), draw(2, 3)), "z": LowRank.zeros(4, 3), "conv": draw(2, 2).T}


def test_what_is_packed_is_what_is_unpacked() -> None:
    """Products, a rank of 0, a transposed tensor, one tensor under two names, an empty group, a name of any letters."""
    sent = products(0)
    sent["twice"] = sent["conv"]
    note, groups = unpack(pack({"client": "ä/#"}, {"sent": sent, "memory": {}}))
    assert note == {"client": "ä/#"} and groups["memory"] == {} and list(groups["sent"]) == sorted(sent)
    for name, value in sent.items():
        given = groups["sent"][name]
        pairs = [(given.B, value.B), (given.A, value.A)] if isinstance(value, LowRank) else [(given, value)]
        assert all(torch.equal(a, b) for a, b in pairs)
    assert unpack(pack({"do": "stop"}, {})) == ({"do": "stop"}, {})


def test_the_longest_job_goes_first_to_whoever_has_the_least() -> None:
    """Costs 5 4 3 3 3 on two: 5 | 4, then 3 to the second (7), 3 to the first (8), 3 to the second (10)."""
    assert spread([3, 5, 3, 4, 3], 2) == [[1, 2], [3, 0, 4]]
    assert spread([1.0], 3) == [[0], [], []] and spread([], 2) == [[], []]
    assert spread([2, 2, 2, 2], 2) == [[0, 2], [1, 3]]


@dataclass(frozen=True)
class Chair:
    """A worker for one client that adds 1, and breaks where its client is named ``broken``."""

    client: Client
    steps: int = 1

    def train(self, adapter: Any, memory: Any, rnd: Round) -> tuple[Any, Any, dict[str, float]]:
        if self.client.id == "broken":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nand more")
        after = {name: LowRank(value.B + 1, value.A) for name, value in adapter.items()}
        return after, {"n": memory.get("n", torch.zeros(1)) + 1}, {"train_loss": 1.0, "seconds": 0.0}


class Chairs:
    def of(self, client: Client) -> Chair:
        return Chair(client)


@contextmanager
def two_threads() -> Iterator[tuple[Processes, Thread]]:
    """Rank 0 of two, the other a thread that serves; same group, same bytes as between processes."""
    store = torch.distributed.HashStore()
    groups: dict[int, Any] = {}

    def connect(rank: int) -> Processes:
        groups[rank] = torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        return Processes(rank, 2, 2, groups[rank])

    other = Thread(target=lambda: serve(connect(1), lambda: (FedIT(), Chairs())), daemon=True)
    other.start()
    yield connect(0), other


def jobs(*ids: str) -> list[Job]:
    sent = {"q": LowRank(torch.zeros(4, 2), torch.ones(2, 3))}
    return [Job(Client(id, 10, 2), sent, {"n": torch.ones(1)}) for id in ids]


def test_a_client_that_runs_out_of_memory_fails_alone_wherever_it_runs() -> None:
    with two_threads() as (processes, other):
        processes.tell({"do": "start"})
        for order in (["a", "broken", "c"], ["broken", "a", "c"]):  # on the other process, then on this one
            finished = list(Accelerate(processes, Silent()).run(FedIT(), Chairs(), jobs(*order), Round(1, 0)))
            assert [done.client.id for done, _ in finished] == order
            for done, memory in finished:
                if done.client.id == "broken":
                    assert isinstance(done, Failed) and "\n" not in done.reason
                    assert done.reason.startswith("its training ended in OutOfMemoryError: CUDA")
                    assert memory["n"] == 1  # what it had
                else:
                    assert isinstance(done, Reply) and memory["n"] == 2
                    assert torch.equal(done.returned["q"].B, torch.ones(4, 2))
        processes.tell({"do": "stop"})
        other.join(10)
        assert not other.is_alive()


def test_a_client_s_exception_ends_the_run_where_the_recipe_says_so() -> None:
    with two_threads() as (processes, _):
        processes.tell({"do": "start"})
        fleet = Accelerate(processes, Silent(), tolerant=False)
        with pytest.raises(FedError, match="client broken ended the run: OutOfMemoryError"):
            list(fleet.run(FedIT(), Chairs(), jobs("a", "broken"), Round(1, 0)))
        with pytest.raises(torch.OutOfMemoryError):
            list(Local(Silent(), tolerant=False).run(FedIT(), Chairs(), jobs("broken"), Round(1, 0)))


def test_the_launcher_s_variables_are_hidden_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of several GPUs in sight one is left: the one of this process's place on its machine."""
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab,1")
    with joined() as processes:
        assert (processes.rank, processes.size, processes.local_size) == (0, 1, 8)
        assert "LOCAL_RANK" not in os.environ and os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["LOCAL_RANK"] == "5"


def test_a_client_that_breaks_in_the_middle_of_training_leaves_the_next_one_as_it_was() -> None:
    """The trainer is shared: what an exception leaves in it must not reach another client's bits."""
    tok = tokenizer(LanguageModel("pico"))
    rows = encode(tok, [f"{i} + 1 =" for i in range(12)], [f" {i + 1}" for i in range(12)], 32)
    breaking: list[bool] = []

    def on_step(loss: float | None) -> None:
        if breaking:
            raise RuntimeError("CUDA error: out of memory")

    settings = SFT(steps=3, batch_size=2, accumulation=2, dropout=0.1, optimizer="kept")
    base = load_model(LanguageModel("pico"), torch.device("cpu"), 0)
    worker = SFTWorker(settings, base, tok, {"a": rows[:6], "b": rows[6:]}, 4, on_step)
    sent = {name: fill(LowRank.zeros(64, 64), 4, torch.Generator().manual_seed(0)) for name in worker.lora.layers}
    a, b = (Job(Client(id, 6, 4), sent, {}) for id in "ab")
    before = attempt(FedIT(), worker, a, Round(1, 0))
    breaking.append(True)
    failed, _ = attempt(FedIT(), worker, b, Round(1, 0))
    breaking.clear()
    after = attempt(FedIT(), worker, a, Round(1, 0))
    assert isinstance(failed, Failed) and "out of memory" in failed.reason
    assert isinstance(before[0], Reply) and isinstance(after[0], Reply)
    assert digest(before[0].returned) == digest(after[0].returned) and digest(before[1]) == digest(after[1])


def test_a_launch_that_spreads_one_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    with joined():
        pass
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(FedError, match="run.parallel=fsdp"), joined():
        pass


def test_whole_networks_too_are_the_same_to_the_bit(tmp_path: Path) -> None:
    """Convolutions of three widths, a cohort of four of eight clients: on one process, then on two."""
    runs = []
    for size in (1, 2):
        (tmp_path / str(size)).mkdir()
        recipe = ["recipe=vision_smoke", "algorithm.name=heterofl", "run.threads=1", "run.rounds=2", "run.output=run"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        done = subprocess.run(
            [*command, str(ROOT / "fedllm/train.py"), *recipe],
            cwd=tmp_path / str(size), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        digests = [
            {id: client["digest"] for id, client in json.loads(line)["clients"].items()}
            for line in (tmp_path / f"{size}/run/rounds.jsonl").read_text().splitlines()
        ]
        runs.append((digests, (tmp_path / f"{size}/run/model/model.safetensors").read_bytes()))
    assert runs[0] == runs[1] and len(runs[0][0]) == 2
