"""Clients with base language models of their own: what they tell each other, and what it must not change."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div

from fedllm import train
from fedllm.algorithms.own_models.fd import FD, grouped
from fedllm.algorithms.own_models.standalone import Standalone
from fedllm.core import Algorithm, Client, Round
from fedllm.data.encoding import encode
from fedllm.errors import FedError
from fedllm.export.hub import ready
from fedllm.federation.build import build_federation
from fedllm.fleets.local import Local
from fedllm.lowrank import LowRank, fill
from fedllm.models.language import LanguageModel, common_tokenizer, config, load, skeleton, tokenizer
from fedllm.models.network import Network
from fedllm.progress import Silent
from fedllm.recipe import page as recipe
from fedllm.rounds import Outcome, federate
from fedllm.wire.serialization import canonical, digest
from fedllm.workers.lora import target_shapes
from fedllm.workers.settings import SFT
from fedllm.workers.sft import SFTWorker

ROOT = Path(__file__).parents[1]
TINY = [
    "recipe=fd_own_models", "run.threads=1", "run.on_client_error=stop", "worker.steps=2", "worker.dropout=0.1",
    "data.train_rows=24", "data.test_rows=4", "eval.generate=false",
]  # fmt: skip


def ran(folder: Path, *arguments: str) -> Path:
    assert train.main([*TINY, f"run.output={folder}", *arguments]) == 0
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    """rounds.jsonl without what a clock said."""
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
        for client in row["clients"].values():
            del client["seconds"]
    return rows


def adapters(run: Path) -> dict[str, bytes]:
    """Every client's own adapter, to the bit."""
    return {file.parent.name: file.read_bytes() for file in (run / "adapter_clients").glob("*/*.safetensors")}


def planned(*arguments: str) -> Any:
    loaded = recipe.load([*TINY, "run.plan=true", *arguments])
    return build_federation(loaded)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of the recipe, a few steps each."""
    return ran(tmp_path_factory.mktemp("straight") / "run")


# --- the run


def test_a_plan_names_each_client_s_base_and_counts_what_travels(straight: Path) -> None:
    """An adapter on q and v: rank (64 + 64) 2 for 2 layers, (96 + 96) 2 for 3; up are the rows of the own tokens."""
    clients = planned().plan()["clients"]
    assert [client["level"] for client in clients] == ["pico", "pico_wide", "pico", "pico_wide"]
    assert [client["trainable_parameters"] for client in clients] == [8 * 512, 8 * 1152, 4 * 512, 4 * 1152]
    assert clients[1]["memory_bytes"] > clients[0]["memory_bytes"]
    first = lines(straight)[0]["clients"]
    for client in clients:
        assert client["bytes_down"] == first[client["id"]]["bytes_down"]
        assert client["bytes_up"] >= first[client["id"]]["bytes_up"] > 0  # 2 steps of 4 rows do not meet all 6 of them


def test_everybody_trains_an_adapter_for_their_own_base(straight: Path) -> None:
    rows = lines(straight)
    assert all(not row["refused"] and len(row["clients"]) == 4 for row in rows)
    own = [client["own_loss"] for client in rows[-1]["clients"].values()]
    assert rows[-1]["eval"]["own_loss"] == pytest.approx(sum(own) / 4) and "loss" not in rows[-1]["eval"]
    assert json.loads((straight / "eval/base.json").read_text())["own_loss"] != rows[-1]["eval"]["own_loss"]
    for k, width in enumerate((64, 96, 64, 96)):
        folder = straight / f"adapter_clients/c{k}"
        described = json.loads((folder / "adapter_config.json").read_text())
        assert described["base_model_name_or_path"] == ("pico", "pico_wide")[k % 2]
        weights = load_file(folder / "adapter_model.safetensors")
        assert {W.shape[1] for name, W in weights.items() if "lora_A" in name} == {width}


def test_what_is_shared_are_answers_token_by_token(straight: Path) -> None:
    """A row is a distribution over the groups; known are the tokens of completions, which end in ``</s>``, 2."""
    shared = load_file(straight / "adapter/shared.safetensors")
    known, rows = shared["known"], shared["rows"]
    assert known.shape == (259,) and rows.shape == (259, 128) and bool(known[2]) and not known[:2].any()
    torch.testing.assert_close(rows[known].sum(1), torch.ones(int(known.sum())))
    assert not (straight / "adapter/adapter_config.json").exists() and not rows[~known].any()


def test_a_resumed_run_is_the_same_to_the_bit(straight: Path, tmp_path: Path) -> None:
    ran(tmp_path / "run", "run.rounds=1")
    ran(tmp_path / "run", "run.overwrite=false", "run.resume=true")
    assert adapters(tmp_path / "run") == adapters(straight) and lines(tmp_path / "run") == lines(straight)


def test_two_processes_give_the_same_run_to_the_bit(straight: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "fedllm/train.py"), *TINY, f"run.output={tmp_path / 'run'}"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert adapters(tmp_path / "run") == adapters(straight) and lines(tmp_path / "run") == lines(straight)


def played(rounds: int, *arguments: str) -> Outcome:
    """The last of some rounds, without what a run writes."""
    loaded = recipe.load([*TINY, *arguments])
    federation, rule, show = build_federation(loaded), loaded.algorithm, Silent()
    worker = federation.worker(lambda loss: None)
    state = canonical(rule.init(federation.model, federation.clients))
    *_, last = federate(
        rule, federation.clients, worker, Local(show, tolerant=False), show,
        state=state, memories={}, first=1, rounds=rounds, seed=0,
    )  # fmt: skip
    return last


def own_adapters(rule: Algorithm, outcome: Outcome) -> dict[str, str]:
    """The digest of what each client would use, by its id."""
    return {r.client.id: digest(rule.personal(r, outcome.memories[r.client.id])) for r in outcome.replies}


def test_without_the_others_answers_it_is_standalone_to_the_bit() -> None:
    """Two forward passes a step, of unequal length, with dropout; and with the answers it is not."""
    common = ["worker.batch_size=2", "worker.accumulation=2"]
    alone, deaf, hears = (
        own_adapters(rule, played(2, *asked, *common))
        for rule, asked in (
            (Standalone(), ["algorithm.name=standalone"]), (FD(), ["algorithm.coefficient=0"]), (FD(), [])
        )
    )  # fmt: skip
    assert len(alone) == 4 and deaf == alone
    assert all(hears[id] != alone[id] for id in alone)


def test_one_base_for_all_will_do_and_columns_that_are_no_tokens_do_not_count() -> None:
    """A model of 264 columns on a vocabulary of 259: rows of 259 answers, which sum to 1."""
    shared = played(1, "model.own=[]", "model.config.vocab_size=264", "algorithm.groups=512").state
    assert shared["rows"].shape == (259, 259) and shared["known"].any()
    torch.testing.assert_close(shared["rows"].sum(1), shared["known"].float())


# --- what cannot be


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["algorithm.name=fedhl"], r"fedhl averages their adapters: take one of .*standalone, fd\."),
        (["worker.optimizer=kept"], "worker.optimizer=kept does not go with algorithm.name=fd"),
        (["run.parallel=ddp"], "run.parallel=ddp does not go with"),
        (["eval.alone=0"], "algorithm.name=standalone is that"),
        (["eval.clients=true"], "own_"),
        (["model.revision=main"], "revision and config are one model's"),
        (["algorithm.groups=1"], "groups=1: give a whole number from 2 up"),
        (["algorithm.name=fedproto"], "standalone, fd"),
        (["clients.rank=96"], "client c0 has rank 96, and .* is 64 x 64"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(asked: list[str], said: str) -> None:
    with pytest.raises(FedError, match=said):
        planned(*asked)


def test_no_common_adapter_is_pushed() -> None:
    with pytest.raises(FedError, match="adapter_clients"):
        ready(recipe.load([*TINY, "hub.push=true", "hub.dry_run=true", "hub.repo=a/b"]))


def test_vocabularies_must_be_one(tmp_path: Path) -> None:
    """The same model with a tokenizer of one token more; as the shared one it fits itself."""
    other = tokenizer(LanguageModel("pico"))
    other.add_tokens(["<more>"])
    other.save_pretrained(tmp_path)
    page = config(LanguageModel("pico"))
    page.vocab_size += 1
    page.save_pretrained(tmp_path)
    with pytest.raises(FedError, match=rf"{tmp_path} has another vocabulary than model.name=pico \(260 .* 259, 1 of"):
        planned(f"model.own=[pico,{tmp_path}]")
    assert len(common_tokenizer(LanguageModel(str(tmp_path), own=(str(tmp_path),)))) == 260


# --- its parts


def test_whose_model_a_client_has() -> None:
    client = Client("c1", 0, level="pico_wide")
    assert LanguageModel("pico", own=("pico", "pico_wide")).of(client) == LanguageModel("pico_wide")
    assert Network("cnn5", own=("cnn1", "cnn2")).of(Client("c1", 0, level="cnn2")) == Network("cnn2")
    assert Network("cnn5").of(Client("c1", 0, level="b1")) == Network("cnn5")


def test_groups_of_answers_by_hand() -> None:
    """p = (.1 .2 .3 .15 .25), groups by c mod 2: (.1 + .3 + .25, .2 + .15); few classes stay as they are."""
    p = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25]])
    torch.testing.assert_close(grouped(p.log(), 2).softmax(1), torch.tensor([[0.65, 0.35]]))
    assert grouped(p, 5) is p


def test_groups_never_make_answers_differ_more() -> None:
    """The data processing inequality, and gradients without NaN where the last group is not full."""
    z = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    by = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))

    def apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return kl_div(a.log_softmax(1), b.log_softmax(1), reduction="none", log_target=True).sum(1)

    coarse = apart(grouped(z, 4), grouped(by, 4))
    assert bool((coarse < apart(z, by)).all())
    coarse.sum().backward()
    assert z.grad is not None and bool(torch.isfinite(z.grad).all())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loss_of_logits_and_tokens_is_trl_s_where_it_is_the_cross_entropy(accumulation: int) -> None:
    """Rows of unequal length in batches of two: every completion token counts the same in both."""
    pico = LanguageModel("pico")
    words = tokenizer(pico)
    rows = encode(words, [f"Q {i}" for i in range(12)], [" x" * (1 + i % 5) for i in range(12)], 64)
    settings = SFT(steps=2, batch_size=2, accumulation=accumulation, learning_rate=1e-2)
    worker = SFTWorker(settings, load(pico, torch.device("cpu"), seed=0), words, {"c": rows}, rounds=1)
    rng = torch.Generator().manual_seed(0)
    sent = {n: fill(LowRank.zeros(*s), 4, rng) for n, s in target_shapes(skeleton(pico), settings.targets).items()}
    seat = worker.of(dataclasses.replace(Client("c", 12), rank=4))
    given: Mapping[str, LowRank]
    given, _, metrics = seat.train(sent, {}, Round(1, 0), loss=cross_entropy)
    wanted, _, trl = seat.train(sent, {}, Round(1, 0))
    for name, W in wanted.items():
        torch.testing.assert_close(given[name].dense(), W.dense(), rtol=1e-3, atol=1e-6)
    assert metrics["train_loss"] == pytest.approx(trl["train_loss"], rel=1e-5)
    assert metrics["tokens"] == trl["tokens"] > 0
