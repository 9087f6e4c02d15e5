"""Private rounds in the loop: who takes part, what is counted, what is told, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_algorithms import SHAPES, model

from fedllm.algorithms.lora.fedhl import FedHL
from fedllm.core import Client, ClientResult, Reply, Round
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.privacy import cohorts, ledger
from fedllm.privacy.accountant import Release, epsilon
from fedllm.privacy.guarantee import ClientGuarantee, ExampleGuarantee, Guarantee, guarantee
from fedllm.privacy.settings import Privacy
from fedllm.recipe import load
from fedllm.rounds import Policy, federate
from fedllm.storage.run_folder import OWN
from fedllm.wire import serialization

CLIENTS = [Client(f"c{i}", 20 + i, 2 + i % 3) for i in range(10)]


def promise(folder: Path, participation: float = 1.0, rounds: int = 4, clients=CLIENTS, **settings) -> Guarantee:
    settings = {"unit": "client", "noise_multiplier": 1.0, **settings}
    return guarantee(
        Privacy(**settings), clients, participation=participation, rounds=rounds, seed=0, folder=folder,
        batch_size=4, steps=5,
    )  # fmt: skip


class Seat:
    steps = 1


class Trainers:
    """Each client moves B its own way."""

    def __init__(self, scale: float = 0.1, loss: float = 1.0) -> None:
        self.scale, self.loss = scale, loss

    def of(self, client):
        return Seat()

    def run(self, algorithm, worker, jobs, rnd):
        for job in jobs:
            returned = {
                name: LowRank(M.B + self.scale * torch.randn(M.B.shape, generator=rnd.rng(job.client.id, name)), M.A)
                for name, M in job.sent.items()
            }
            yield ClientResult(Reply(job.client, job.sent, returned, {"train_loss": self.loss}), {})


class Screen:
    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def play(privacy: Guarantee, trainers: Trainers | None = None, first: int = 1, rounds: int = 4, participation=1.0, **o):
    rule, trainers = FedHL(), trainers or Trainers()
    state = o.get("state") or serialization.canonical(rule.init(model(), CLIENTS))
    return list(
        federate(
            rule, CLIENTS, trainers, trainers, Screen(), state=state, memories={}, first=first, rounds=rounds, seed=0,
            participation=participation, policy=Policy(attempts=1, privacy=privacy),
        )
    )  # fmt: skip


def test_round_robin_is_even():
    counts = Counter(c.id for t in range(1, 21) for c in cohorts.round_robin(CLIENTS, 0.3, Round(t, 5)))
    assert set(counts.values()) == {6}
    assert cohorts.largest(cohorts.round_robin, CLIENTS, 0.3, 5, 21) == 7
    assert cohorts.largest(cohorts.uniform, CLIENTS, 0.3, 5, 20) > 6
    assert len({tuple(c.id for c in cohorts.round_robin(CLIENTS, 0.3, Round(1, s))) for s in range(9)}) > 1


def test_poisson_cohorts_vary_and_may_be_empty():
    sizes = {len(cohorts.poisson(CLIENTS, 0.3, Round(1, 0))) for _ in range(60)}
    assert len(sizes) > 2
    assert cohorts.poisson(CLIENTS, 0.5, Round(1, 0), flip=lambda p: False) == []


def test_a_public_run_s_epsilon_is_that_of_the_client_with_most_rounds(tmp_path):
    outcomes = play(promise(tmp_path, 0.3), participation=0.3)
    told = [outcome.record["privacy"] for outcome in outcomes]
    assert [of["releases"] for of in told] == [1, 2, 3, 4]
    assert [of["k"] for of in told] == [1, 1, 1, 2]
    assert told[-1]["epsilon"] == pytest.approx(epsilon([Release(1.0, 1.0, 2)], 1e-5))
    assert promise(tmp_path, 0.3).at_the_end == pytest.approx(told[-1]["epsilon"])


def test_a_secret_run_names_nobody_and_goes_on_without_anybody(tmp_path, monkeypatch):
    monkeypatch.setattr(cohorts.poisson, "__defaults__", (lambda p: False,))
    outcomes = play(promise(tmp_path, 0.3, rounds=2, cohort="secret"), rounds=2, participation=0.3)
    assert [len(outcome.replies) for outcome in outcomes] == [0, 0]
    assert "c1" not in json.dumps([outcome.record for outcome in outcomes]) + (tmp_path / ledger.NAME).read_text()
    assert not torch.equal(outcomes[0].state["W/q"].dense(), torch.zeros(SHAPES["q"]))  # noise was released


def test_two_runs_of_one_seed_have_different_noise(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    one, other = (play(promise(tmp_path / n), rounds=1)[0].state["W/q"] for n in "ab")
    assert not torch.equal(one.dense(), other.dense())
    seeded = [play(promise(tmp_path / n, noise="seeded"), rounds=1)[0].state["W/q"] for n in ("a", "b")]
    assert torch.equal(seeded[0].dense(), seeded[1].dense())
    assert any("No guarantee" in line for line in promise(tmp_path, noise="seeded").lines)


def test_nothing_raw_is_told(tmp_path, monkeypatch):
    """With the release held fixed, other updates and other losses leave every told byte as it is."""
    monkeypatch.setattr(
        "fedllm.privacy.mechanism.summed",
        lambda rule, begun, replies, clip: {n: torch.zeros(S.B.shape).double() for n, S in begun.expected.items()},
    )
    told = []
    for folder, trainers in (("a", Trainers()), ("b", Trainers(scale=7.0, loss=99.0))):
        (tmp_path / folder).mkdir()
        outcomes = play(promise(tmp_path / folder, noise="seeded"), trainers, rounds=3)
        told.append(json.dumps([outcome.record for outcome in outcomes]))
        assert "train_loss" in outcomes[0].private["clients"]["c0"]
    assert told[0] == told[1]
    known = {"round", "train_loss", "weights", "truncation_error", "bytes_down", "bytes_up", "flops", "seconds"}
    known |= {"clients", "refused", "eval", "suspect", "robust", "repeated", "bytes_wasted", "telemetry", "privacy"}
    assert {key for record in json.loads(told[0]) for key in record} == known


def test_a_crash_between_the_line_and_the_checkpoint_counts_twice(tmp_path):
    privacy = promise(tmp_path)
    outcomes = play(privacy, rounds=2)
    again = play(privacy, first=2, rounds=2, state=outcomes[0].state)  # as if round 2 had not been saved
    assert again[-1].record["privacy"]["releases"] == 3
    assert again[-1].record["privacy"]["epsilon"] == pytest.approx(epsilon([Release(1.0, 1.0, 3)], 1e-5))


def test_a_torn_line_was_no_release_and_a_broken_one_ends_all(tmp_path):
    privacy = promise(tmp_path)
    play(privacy, rounds=1)
    path = tmp_path / ledger.NAME
    path.write_text(path.read_text() + '{"round": 2, "noi')
    assert len(ledger.read(path)) == 1
    play(privacy, first=2, rounds=2)
    assert [line["round"] for line in ledger.read(path)] == [1, 2]
    path.write_text("{nonsense\n" + path.read_text())
    with pytest.raises(FedError, match="nobody knows how much"):
        ledger.read(path)


def test_a_run_stops_before_the_round_that_would_pass_its_budget(tmp_path):
    privacy = promise(tmp_path, noise_multiplier=None, epsilon=8.0)
    assert privacy.at_the_end <= 8.0
    whole = play(privacy)
    assert len(whole) == 4
    assert whole[-1].record["privacy"]["epsilon"] <= 8.0
    assert play(privacy, first=4, state=whole[2].state) == []  # a fifth release would pass it


def test_example_rounds_count_every_asked_client_and_tell_no_loss(tmp_path):
    privacy = promise(tmp_path, unit="example", delta=1e-3, rounds=2)
    assert isinstance(privacy, ExampleGuarantee)
    outcomes = play(privacy, rounds=2)
    assert outcomes[-1].record["privacy"]["k"] == 10  # five steps, two rounds
    smallest = epsilon([Release(1.0, 4 / 20, 10)], 1e-3)
    assert outcomes[-1].record["privacy"]["epsilon"] == pytest.approx(smallest)
    assert "train_loss" not in outcomes[-1].record["clients"]["c0"]


@pytest.mark.parametrize("settings", [{"delta": 0.2}, {"unit": "example", "delta": 0.06}])
def test_a_delta_that_publishes_a_member_is_refused(tmp_path, settings):
    with pytest.raises(FedError, match="published whole"):
        promise(tmp_path, **settings)


def test_no_guarantee_is_the_round_as_it_was(tmp_path):
    assert type(promise(tmp_path, unit="none")) is Guarantee
    record = play(Guarantee(), rounds=1)[0]
    assert record.record == record.private
    assert not (tmp_path / ledger.NAME).exists()


def test_the_folder_knows_its_private_part():
    assert OWN.fullmatch("private")
    assert OWN.fullmatch("privacy.jsonl")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy.noise_multiplier=null"], "needs privacy.epsilon"),
        (["privacy.epsilon=8"], "one of the two"),
        (["algorithm.name=mfedloru"], "Take one of fedit"),
        (["algorithm.name=zero_padding", "algorithm.weights=norm"], "more with a reply than add it up"),
        (["robust.name=median"], "moves all"),
        (["admission.norm_bound=3"], "moves all"),
        (["run.quorum=0.5"], "who was missing"),
        (["run.attempts=2"], "who was missing"),
        (["wire.up=int8"], "8 bits"),
        (["eval.clients=true"], "has no noise"),
        (["eval.alone=1"], "has no noise"),
        (["hub.clients=true"], "has no noise"),
        (["privacy.unit=example"], "worker.epochs makes"),
        (["privacy.unit=example", "worker.steps=3", "worker.accumulation=2"], "draws its rows at once"),
        (["privacy.unit=example", "worker.steps=3", "worker.gradient_checkpointing=true"], "recomputes"),
        (["privacy.unit=example", "worker.steps=3", "model.quantization=4bit"], "quantization"),
        (["privacy.unit=example", "worker.steps=3", "algorithm.name=fd"], "no noise on it"),
        (["privacy.unit=example", "worker.steps=3", "eval.alone=0"], "nobody counts"),
    ],
)
def test_what_would_break_the_guarantee_is_refused(overrides, words):
    base = ["recipe=smoke", "privacy.unit=client", "privacy.noise_multiplier=1", "worker.steps=null"]
    with pytest.raises(FedError, match=words):
        load([*base, *overrides])


def test_a_private_recipe_is_read_again_as_itself(tmp_path):
    recipe = load(["recipe=smoke", "privacy.unit=client", "privacy.epsilon=8"])
    assert recipe.run.attempts == 1
    assert recipe.rule == "fedhl, B only, equal weights"
    assert recipe.unpublished == recipe.output / "private"
    assert isinstance(recipe.guarantee(CLIENTS), ClientGuarantee)
    page = tmp_path / "again.yaml"
    page.write_text(json.dumps(dict(recipe.page)))
    assert load([f"recipe={page}"]).privacy == recipe.privacy
    assert load(["recipe=smoke"]).run.attempts == 3
