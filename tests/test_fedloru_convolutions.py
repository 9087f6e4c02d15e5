"""The FedLoRU family on convolutions: its equalities, the paper's counts, and whole runs through the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedllm.algorithms.lora.fedloru import FedLoRAAvg, FedLoRU, added
from fedllm.algorithms.lora.mfedloru import MFedLoRU
from fedllm.algorithms.lora.pfedloru import PFedLoRU
from fedllm.core import Algorithm, Tensors, within
from fedllm.errors import FedError
from fedllm.federation.build import build_federation
from fedllm.lowrank import LowRank
from fedllm.models.lowrank_conv import plain
from fedllm.models.network import Network, fitted
from fedllm.recipe import load
from fedllm.train import main
from tests.test_vision import records
from tests.test_vision_algorithms import EXAMPLES, FULL, MIXED, bench, bits, close, dense, played, rounds

ROOT = Path(__file__).parents[1]


def served(rule: Algorithm, **how: Any) -> Tensors:
    return rule.served(played(rule, FULL, **how)[0])


def logits(rule: Algorithm, update: Tensors, **how: Any) -> Tensor:
    worker, _ = bench(rule, FULL, **how)
    return worker.fitted(plain(worker.model, update)).eval()(EXAMPLES["test"].x).detach()


# --- equalities of the specification, 6.5


@pytest.mark.parametrize("w0", ["zero", "keep"])
def test_without_an_accumulation_it_is_fedlora(w0: Any) -> None:
    """To the bit, dropout included."""
    how: dict[str, Any] = {"n": 3, "w0": w0, "dropout": 0.1}
    assert bits(served(FedLoRU(tau=99), **how)) == bits(served(FedLoRAAvg(), **how))


def test_with_all_at_full_rank_mfedloru_is_fedloru() -> None:
    """Clients of rank 2 that hold all of r = 2 train the factors themselves: to the bit, accumulations included."""
    alike = [dataclasses.replace(client, rank=2) for client in MIXED]
    ours, theirs = (played(rule, alike, n=3)[0] for rule in (MFedLoRU(tau=1), FedLoRU(tau=1)))
    assert bits(ours) == bits(theirs)


def test_without_personal_steps_pfedloru_is_fedloru() -> None:
    """To the bit: no step is taken for L U, which add zero."""
    ours = played(PFedLoRU(tau=1, personal_share=0.0), FULL, n=3)
    theirs = played(FedLoRU(tau=1), FULL, n=3)
    assert bits(ours[0]) == bits(theirs[0])
    assert ours[2][0].metrics["train_loss"] == theirs[2][0].metrics["train_loss"]
    assert not any(M.B.any() for M in within("personal", ours[1]["c0"]).values())


@pytest.mark.parametrize(
    ("reset", "w0", "least", "most"),
    [
        ("random", "zero", 0.0, 1e-4),
        ("random", "keep", 0.0, 1e-4),
        ("momentum", "zero", 0.0, 1e-2),
        ("momentum", "keep", 1e-3, 10.0),
    ],
)
def test_an_accumulation_keeps_the_function_or_adds_exactly_the_adapter(
    reset: Any, w0: Any, least: float, most: float
) -> None:
    """What clients start from as round 2 begins, on top of the base: D still, or 2 D.

    Without a base 2 D computes nearly what D did: norms on batch statistics undo the 2, but for their epsilon.
    """
    rule = FedLoRU(tau=1, reset=reset)
    state, _, _ = played(rule, FULL, n=1, w0=w0)
    sent = rule.download(state, bench(rule, FULL)[1][0], rounds(2)[1])
    start = added(within("W", rule.accumulated(state, rounds(2)[1])), within("adapter", sent))
    D = {name: M.dense() for name, M in within("adapter", state).items() if isinstance(M, LowRank)}
    assert len(D) == 19 and all(bool(M.any()) for M in D.values())
    times = {"random": 1.0, "momentum": 2.0}[reset]
    close({name: value for name, value in start.items() if name in D}, {name: times * M for name, M in D.items()}, 1e-5)
    apart = float((logits(rule, start, w0=w0) - logits(rule, rule.served(state), w0=w0)).abs().max())
    assert least <= apart < most


def test_the_rank_of_what_was_learned_grows_with_the_accumulations() -> None:
    """r = 2. W_T - W_0 has rank 2, 4, 6 after one, two and three of them, as matrices 8 x 72."""
    rule = FedLoRU(tau=1)
    for n in (2, 3, 4):
        state = played(rule, FULL, n=n, w0="keep")[0]
        W = dense(within("W", state))["stages.3.1.conv2.weight"]
        assert int(torch.linalg.matrix_rank(W.double(), rtol=1e-6)) == 2 * (n - 1)


def test_the_base_never_travels_and_is_in_what_is_scored() -> None:
    """With `keep` the drawn convolutions count in every score, and in no payload: an adapter of rank 2 beside each."""
    rule = FedLoRU()
    worker, clients = bench(rule, FULL, w0="keep")
    state, _, replies = played(rule, FULL, n=1, w0="keep")
    name = "stages.0.0.conv1.weight"
    for payload in (within("adapter", replies[0].sent), replies[0].returned):
        assert {key for key, value in payload.items() if isinstance(value, LowRank)} == set(worker.model.frozen or ())
        assert payload[name].rank == 2
    update = rule.served(state)
    net = worker.fitted(plain(worker.model, update))
    W = worker.model.weights[name]
    torch.testing.assert_close(net.state_dict()[name], W + update[name].dense().view_as(W))
    first = worker.fitted(dict(worker.model.weights)).eval()(EXAMPLES["test"].x).argmax(1)
    before = worker.evaluate({}).metrics["accuracy"]
    assert before == pytest.approx(float((first == EXAMPLES["test"].y).float().mean()))


def test_stem_norms_and_classes_are_trained_and_averaged() -> None:
    state, _, replies = played(FedLoRU(tau=1), n=1)
    shares = {reply.client.id: reply.client.num_samples / 64 for reply in replies}
    for name in ("stem.conv.weight", "stages.0.0.norm1.weight", "heads.4.fc.bias"):
        returned = {reply.client.id: reply.returned[name] for reply in replies}
        assert all(not torch.equal(W, replies[0].sent[f"adapter/{name}"]) for W in returned.values())
        mean = sum(shares[id] * W for id, W in returned.items())
        torch.testing.assert_close(state[f"adapter/{name}"], mean)


def test_small_clients_of_mfedloru_train_nested_factors_alone() -> None:
    """Rank 1 of r = 4: `B_d B_u` and `A_d A_u` of rank 1 leave zero; B and A, which they are added to, stay."""
    rule = MFedLoRU(tau=9)
    _, _, replies = played(rule, n=1)
    reply = next(reply for reply in replies if reply.client.rank == 1)
    name = "stages.3.1.conv2.weight"
    B, A = reply.returned[f"B/{name}"], reply.returned[f"A/{name}"]
    assert (B.B.shape, B.A.shape, A.B.shape, A.A.shape) == ((8, 1), (1, 4), (4, 1), (1, 72))
    assert all(bool(factor.any()) for factor in (B.B, B.A, A.B, A.A))
    whole, sent = rule.trained(reply)[name], reply.sent[f"adapter/{name}"]
    torch.testing.assert_close((whole.B, whole.A), (sent.B + B.B @ B.A, sent.A + A.B @ A.A))
    unmoved = rule.trained(dataclasses.replace(reply, returned=rule.expected(reply)))
    close(unmoved, within("adapter", reply.sent), 0)


def test_a_personal_model_has_both_updates_and_its_own_score() -> None:
    rule = PFedLoRU(tau=1, personal_rank=1)
    _, memories, replies = played(rule, FULL, n=2)
    worker, _ = bench(rule, FULL)
    own, reply = rule.personal(replies[0], memories["c0"]), replies[0]
    name = "stages.1.0.shortcut.conv.weight"
    W, mine = within("W", memories["c0"])[name], memories["c0"][f"personal/{name}"]
    assert mine.rank == 1 and bool(mine.B.any())
    close({name: own[name]}, {name: dense({name: W})[name] + reply.returned[name].dense() + mine.dense()}, 1e-5)
    scores = worker.measure(own, torch.arange(10))
    assert scores["accuracy"] == pytest.approx(reply.metrics["own_accuracy"])
    assert scores["loss"] == pytest.approx(reply.metrics["own_loss"], rel=1e-4)


def test_parts_of_a_round_are_its_steps_and_go_on_with_its_batches() -> None:
    """Batches 0 to 1 and 2 to 4 of five; at a rate of 0 their losses are those of the whole round's steps."""
    worker, clients = bench(FedLoRU(), FULL, learning_rate=0.0, batch_size=3, epochs=1)
    rule, rnd = FedLoRU(), rounds(1)[0]
    client = clients[1]  # 16 examples: five whole batches, and a single one is dropped
    sent = within("adapter", rule.download(rule.init(worker.model, clients), client, rnd))
    seat = worker.of(client)
    whole, first, second = (seat.train(sent, {}, rnd, part=part)[2] for part in ((0.0, 1.0), (0.0, 0.4), (0.4, 1.0)))
    assert (whole["steps"], first["steps"], second["steps"]) == (5, 2, 3)
    assert whole["flops"] == pytest.approx(first["flops"] + second["flops"]) and first["flops"] > 0
    assert 5 * whole["train_loss"] == pytest.approx(2 * first["train_loss"] + 3 * second["train_loss"], rel=1e-5)
    same, memory, metrics = seat.train(sent, {}, rnd, part=(0.0, 0.0))
    assert bits(same) == bits(sent) and (memory, metrics) == ({}, {})


# --- pages and plans


def plan(*arguments: str) -> dict[str, Any]:
    recipe = load([*arguments, "run.plan=true"])
    return build_federation(recipe).plan()


TABLE_1 = {
    ("fedloru_cifar10", 128): "4.59M",
    ("fedloru_cifar10", 96): "3.44M",
    ("fedloru_cifar10", 64): "2.30M",
    ("fedloru_cifar100", 128): "4.63M",
    ("fedloru_cifar100", 96): "3.49M",
    ("fedloru_cifar100", 64): "2.35M",
}
"""FedLoRU's Table 1: the column "#params" as printed."""


@pytest.mark.parametrize(("page", "rank"), TABLE_1)
def test_the_plan_of_a_page_has_the_paper_s_counts(page: str, rank: int) -> None:
    """35,712 r of the convolutions' factors, 9,600 of the norms, 1,728 of the stem and 513 a class."""
    planned = plan(f"recipe={page}", f"clients.rank={rank}")
    (level,) = planned["levels"]
    classes = int(page.removeprefix("fedloru_cifar"))
    assert level["params"] == 35_712 * rank + 9_600 + 1_728 + 513 * classes
    assert f"{level['params'] / 1e6:.2f}M" == TABLE_1[page, rank]
    assert level["down_params"] == level["up_params"] == level["params"]
    cohorts = planned["totals"]["rounds"] * planned["totals"]["cohort"]
    assert planned["totals"]["comm_bytes"] == 8 * cohorts * level["params"] and cohorts == 400 * 50


@pytest.mark.parametrize("rule", ["fedlora_avg", "pfedloru"])
def test_the_other_rules_send_as_much(rule: str) -> None:
    """FedLoRA's count is FedLoRU's; pFedLoRU's is that of its shared part."""
    ours, theirs = (plan("recipe=fedloru_cifar10", f"algorithm.name={name}")["levels"] for name in (rule, "fedloru"))
    assert ours == theirs


def test_small_clients_of_mfedloru_send_what_the_paper_says() -> None:
    """r_k (m + r) + r_k (r + n) a convolution, or a factor whole where that is less; all are sent all of r = 128."""
    mixed = ["clients.count=20", "clients.rank=[128,64,32,16]"]
    planned = plan("recipe=fedloru_cifar10", "algorithm.name=mfedloru", *mixed)
    shapes = [W.flatten(1).shape for name, W in Network().maker("plain", 10)().state_dict().items()
              if name.startswith("stages") and W.ndim == 4]  # fmt: skip
    rest = 9_600 + 1_728 + 5_130
    for level in planned["levels"]:
        r_k = int(level["name"].removeprefix("rank "))
        factors = [pair for m, n in shapes for pair in ((m, 128), (128, n))]
        up = sum(min(rows * columns, r_k * (rows + columns)) for rows, columns in factors)
        assert level["up_params"] == up + rest
        assert level["down_params"] == 35_712 * 128 + rest + 1, "and the client's rank"
    assert [level["name"] for level in planned["levels"]] == ["rank 128", "rank 64", "rank 32", "rank 16"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["clients.levels=[b4,b2]"], "differ by their rank alone. Set clients.rank"),
        (["model.name=transformer", "data.name=wikitext2"], "no convolution after its stem"),
        (["clients.rank=[4,2]"], r"\[2, 4\].*mfedloru"),
    ],
)
def test_what_cannot_be_is_said(overrides: list[str], message: str) -> None:
    with pytest.raises(FedError, match=message):
        plan("recipe=fedloru_cifar10", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["worker.alpha=0"], "worker.alpha=0: give a finite number above 0"),
        (["worker.dropout=1"], "worker.dropout=1: give a number from 0 to below 1"),
        (["algorithm.name=fedhl"], "fedhl does not train what worker.name=vision trains"),
        (["model.w0=none"], "model.w0='none': give 'zero' or 'keep'"),
    ],
)
def test_wrong_values_are_said(overrides: list[str], message: str) -> None:
    with pytest.raises(FedError, match=message):
        load(["recipe=fedloru_cifar10", *overrides])


SMALL = [
    "data.name=prototypes", "data.train_rows=96", "data.test_rows=40", "model.widths=[8,8,8,8]", "clients.count=4",
    "clients.rank=4", "worker.epochs=1", "worker.batch_size=8", "worker.test_batch_size=40", "algorithm.tau=1",
    "eval.every=1", "run.threads=1", "worker.schedule=constant",
]  # fmt: skip


def launch(folder: Path, *arguments: str) -> None:
    """On two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "fedllm/train.py"), *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("page", "rule"), [("fedloru_cifar10", "fedloru"), ("fedloru_cifar100", "pfedloru")], ids=lambda name: name
)
def test_a_resumed_run_on_two_processes_is_the_straight_run_to_the_bit(
    page: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small variant of the page: one accumulation, cohorts of two of four clients; its model has its score."""
    monkeypatch.chdir(tmp_path)
    arguments = [f"recipe={page}", f"algorithm.name={rule}", *SMALL]
    assert main([*arguments, "run.rounds=2", "run.output=straight"]) == 0
    assert main([*arguments, "run.rounds=1", "run.output=stopped"]) == 0
    launch(tmp_path, *arguments, "run.rounds=2", "run.output=stopped", "run.resume=true")
    assert records(tmp_path / "stopped") == records(tmp_path / "straight")
    ours, theirs = (load_file(tmp_path / run / "model/model.safetensors") for run in ("straight", "stopped"))
    assert bits(ours) == bits(theirs)
    described = json.loads((tmp_path / "straight/model/network.json").read_text())
    settings = described["model"] | {"widths": tuple(described["model"]["widths"])}
    make = Network(**settings).maker(described["variant"], described["classes"], described["length"])
    test = load([f"recipe={tmp_path / 'straight/recipe.yaml'}"]).data.task.load(None, "test", None, 0)
    z = fitted(make(), ours).eval()(test.x)
    score = records(tmp_path / "straight")[-1]["eval"]["accuracy"]
    assert float((z.argmax(1) == test.y).float().mean()) == pytest.approx(score)
    first = records(tmp_path / "straight")[0]["clients"]
    for client in [client for client in plan(*arguments)["clients"] if client["id"] in first]:
        for key in ("bytes_down", "bytes_up", "steps"):
            assert client[key] == first[client["id"]][key]
    assert records(tmp_path / "straight")[1]["telemetry"]["truncation"]["4"] > 0, "two updates of rank 4"
