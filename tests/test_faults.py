"""Faults on purpose, and what the loop does about them: quorum, deadline, refusals, remarks, interruption."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedllm.algorithms import ALGORITHMS
from fedllm.core import Algorithm, Client, Failed, Job, Model, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.fleets.faults import LAST, Faults
from fedllm.fleets.interrupt import ECHO, once
from fedllm.fleets.local import Local
from fedllm.fleets.resumed import Waiting
from fedllm.lowrank import LowRank
from fedllm.progress import Silent
from fedllm.recipe import load
from fedllm.rounds import Interrupted, Outcome, Policy, federate
from fedllm.server.robust import Clip, Krum
from fedllm.wire.serialization import digest

CLIENTS = [Client(f"c{i}", 10 + i, rank) for i, rank in enumerate([4, 4, 4, 4, 4])]
SHAPES = {"q": (7, 5), "v": (6, 8)}
NONE = Faults()


@dataclass(frozen=True)
class Chair:
    """Moves what it is sent by a step that depends on the client and the round; remembers how often."""

    client: Client
    trained: list[str]
    steps: int = 1

    def train(self, adapter: Any, memory: Any, rnd: Round, frozen: Any = None) -> tuple[Any, Any, dict[str, float]]:
        self.trained.append(self.client.id)
        generator = rnd.rng("train", self.client.id)
        after = {
            name: LowRank(W.B + 0.1 * torch.randn(W.B.shape, generator=generator), W.A) for name, W in adapter.items()
        }
        return after, {"times": memory.get("times", torch.zeros(1)) + 1}, {"train_loss": 1.0, "seconds": 1.0}


@dataclass(frozen=True)
class Chairs:
    trained: list[str] = field(default_factory=list)

    def of(self, client: Client) -> Chair:
        return Chair(client, self.trained)


def federation(
    rule: str = "flexlora", faults: Faults = NONE, rounds: int = 3, **options: Any
) -> tuple[Iterator[Outcome], Chairs]:
    algorithm: Algorithm = ALGORITHMS[rule]()
    model = Model({name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()})
    worker = options.pop("worker", Chairs())
    fleet = options.pop("fleet", faults.around(Local(Silent())))
    given = {"state": algorithm.init(model, CLIENTS), "memories": {}, "first": 1, "rounds": rounds, "seed": 0} | options
    return federate(algorithm, CLIENTS, worker, fleet, Silent(), **given), worker


def run(*args: Any, **options: Any) -> list[Outcome]:
    return list(federation(*args, **options)[0])


def on(*clients: str, **shares: float) -> Faults:
    return Faults(**shares, clients=clients)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("drop", "it dropped out"),
        ("nan", "1 values that are NaN"),
        ("wrong_rank", "has rank 5, and rank 4 was expected"),
    ],
)
@pytest.mark.parametrize("rule", ["fedit", "zero_padding", "flexlora", "flora", "fedhl"])
def test_what_cannot_be_averaged_is_refused_with_the_reason(rule: str, kind: str, words: str) -> None:
    """And its weight goes to the others, and what it cost is in the ledger."""
    outcome = run(rule, on("c1", **{kind: 1.0}), rounds=1)[0]
    record = outcome.record
    assert list(record["refused"]) == ["c1"] and words in record["refused"]["c1"]
    assert set(record["weights"]) == {"c0", "c2", "c3", "c4"} and sum(record["weights"].values()) == pytest.approx(1)
    assert record["bytes_wasted"]["down"] == record["clients"]["c0"]["bytes_down"]
    assert (record["bytes_wasted"]["up"] > 0) is (kind != "drop")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("zeros", "nothing but zeros"),
        ("huge", "times the cohort's median"),
        ("stale", "to the bit, what it returned the last time"),
    ],
)
@pytest.mark.parametrize("rule", ["fedit", "zero_padding", "flexlora", "flora", "fedhl"])
def test_what_is_averaged_although_it_is_odd_is_remarked_on(rule: str, kind: str, words: str) -> None:
    """Or refused, where factors so large would replace those of all others."""
    record = run(rule, on("c1", **{kind: 1.0}), rounds=2)[-1].record
    if kind == "huge" and ALGORITHMS[rule].averages_factors:
        assert "this rule averages factors" in record["refused"]["c1"] and record["suspect"] == {}
    else:
        assert record["refused"] == {} and list(record["suspect"]) == ["c1"] and words in record["suspect"]["c1"]


def test_an_honest_run_is_remarked_on_by_nobody() -> None:
    for outcome in run(rounds=3):
        assert outcome.record["suspect"] == outcome.record["refused"] == outcome.record["robust"] == {}
        assert outcome.record["repeated"] == [] and outcome.record["bytes_wasted"] == {"down": 0, "up": 0}


def test_faults_are_drawn_from_the_seed_and_by_their_probability() -> None:
    """10000 draws: each of the kinds within 4 sigma, sqrt(n p (1 - p)), of its share; the same again every time."""
    faults = Faults(drop=0.1, nan=0.2, stale=0.3)
    drawn = [faults.of(CLIENTS[0], Round(index, 0)) for index in range(10_000)]
    for kind, share in (("drop", 0.1), ("nan", 0.2), ("stale", 0.3), ("", 0.4), ("huge", 0.0)):
        assert abs(drawn.count(kind) - 10_000 * share) <= 4 * (10_000 * share * (1 - share)) ** 0.5, kind
    assert drawn == [faults.of(CLIENTS[0], Round(index, 0)) for index in range(10_000)]
    assert drawn[:50] != [faults.of(CLIENTS[1], Round(index, 0)) for index in range(50)]
    assert drawn[:50] != [faults.of(CLIENTS[0], Round(index, 0, attempt=1)) for index in range(50)]


def test_no_faults_are_no_fleet_of_their_own() -> None:
    fleet = Local(Silent())
    assert Faults().around(fleet) is fleet
    with pytest.raises(FedError, match="faults: probabilities"):
        Faults(nan=0.6, drop=0.6)


def test_a_stale_client_repeats_itself_also_after_a_resume() -> None:
    """Its last update waits in its memory, so a run resumed after round 1 is the straight one."""
    faults = on("c2", stale=1.0)
    straight = run(faults=faults, rounds=3)
    digests = [outcome.record["clients"]["c2"]["digest"] for outcome in straight]
    assert len(set(digests)) == 1 and any(name.startswith(LAST) for name in straight[0].memories["c2"])
    first = straight[0]
    resumed = run(faults=faults, first=2, state=first.state, memories=first.memories, records=[first.record])
    assert [strip(o.record) for o in resumed] == [strip(o.record) for o in straight[1:]]


def strip(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


def test_a_straggler_is_waited_for_unless_there_is_a_deadline() -> None:
    faults = on("c3", straggle=1.0)
    assert run(faults=faults, rounds=1)[0].record["clients"]["c3"]["seconds"] == 3601
    late = run(faults=faults, rounds=1, policy=Policy(deadline=60))[0].record
    assert late["refused"] == {"c3": "It took 3601.0 s, and the deadline is 60 s."}


def test_a_refused_client_goes_on_from_what_it_remembered_before() -> None:
    """NaN in round 1 only: its memory counts rounds 2 and 3, the others' all three."""

    @dataclass(frozen=True)
    class First(Faults):
        def of(self, client: Client, rnd: Round) -> str:
            return super().of(client, rnd) if rnd.index == 1 else ""

    outcome = run(faults=First(nan=1.0, clients=("c1",)), rounds=3)[-1]
    assert {id: int(memory["times"]) for id, memory in outcome.memories.items()} == {
        "c0": 3, "c1": 2, "c2": 3, "c3": 3, "c4": 3,
    }  # fmt: skip


@dataclass(frozen=True)
class Flaky:
    """A fleet whose clients fail in the first ``attempts`` attempts at a round."""

    attempts: int
    fails: Callable[[Client], bool] = lambda client: True

    def run(self, algorithm: Algorithm, worker: Any, jobs: Sequence[Job], rnd: Round) -> Iterator[Any]:
        for job, done in zip(jobs, Local(Silent()).run(algorithm, worker, jobs, rnd), strict=True):
            bad = rnd.attempt < self.attempts and self.fails(job.client)
            yield (Failed(job.client, "It is down."), {}) if bad else done


def test_below_the_quorum_the_round_is_repeated_with_another_cohort() -> None:
    """Cohorts of 3 of 5; the third attempt counts, and what the others cost is in the ledger."""
    outcome = run(fleet=Flaky(2), rounds=1, participation=0.6, policy=Policy(quorum=0.5))[0]
    record = outcome.record
    cohorts = [set(refused) for refused in record["repeated"]] + [set(record["clients"])]
    assert len(cohorts) == 3 and all(len(cohort) == 3 for cohort in cohorts)
    assert cohorts[0] != cohorts[1] or cohorts[1] != cohorts[2]
    assert record["refused"] == {} and outcome.round == Round(1, 0, rounds=1, attempt=2)
    assert record["bytes_wasted"] == {"down": 2 * record["bytes_down"], "up": 0}


def test_the_quorum_is_a_share_of_the_cohort() -> None:
    """Two of five fail: 3 / 5 is enough for 0.6 and too little for 0.61, which ends the run after its attempts."""
    fleet = Flaky(9, lambda client: client.id in {"c0", "c4"})
    assert run(fleet=fleet, rounds=1, policy=Policy(quorum=0.6))[0].record["repeated"] == []
    with pytest.raises(
        FedError, match=r"round 1: fewer than 4 usable updates in 3 attempts.*c0: It is down.*run.quorum"
    ):
        run(fleet=fleet, rounds=1, policy=Policy(quorum=0.61))
    with pytest.raises(FedError, match="fewer than 1 usable updates in 1 attempts"):
        run(fleet=Flaky(9), rounds=1, policy=Policy(attempts=1))


def test_a_guard_that_needs_more_replies_raises_the_quorum() -> None:
    fleet = Flaky(1, lambda client: client.id in {"c0", "c4"})
    record = run(fleet=fleet, rounds=1, policy=Policy(robust=Krum(liars=1)))[0].record
    assert len(record["repeated"]) == 1 and sorted(record["weights"].values()) == [0, 0, 0, 0, 1]


def test_a_huge_update_is_bounded_by_admission_or_by_a_guard() -> None:
    faults = on("c1", huge=1.0)
    refused = run(faults=faults, rounds=1, policy=Policy(norm_bound=5.0))[0].record
    assert "the bound is 5 times" in refused["refused"]["c1"]
    clipped = run(faults=faults, rounds=1, policy=Policy(robust=Clip()))[0].record
    assert list(clipped["robust"]) == ["c1"] and clipped["refused"] == {}


def test_a_state_that_is_no_longer_finite_ends_the_run() -> None:
    """Five admissible updates of 1e17, and a rule that multiplies them: 1e85 is no float32."""

    @dataclass(frozen=True)
    class Product(Algorithm):
        def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
            return {"w": torch.zeros(2)}

        def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
            return state

        def local(self, worker: Any, sent: Tensors, memory: Tensors, rnd: Round) -> Any:
            return {"w": torch.full((2,), 1e17)}, {}, {"seconds": 0.0}

        def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
            return {"w": torch.stack([reply.returned["w"] for reply in replies]).prod(dim=0)}

    rule = Product()
    loop = federate(
        rule, CLIENTS, Chairs(), Local(Silent()), Silent(), state={"w": torch.zeros(2)}, memories={}, first=1, rounds=1,
        seed=0,
    )  # fmt: skip
    with pytest.raises(FedError, match="round 1: the aggregate of w is no longer finite.*norm_bound"):
        list(loop)


def test_an_interrupted_round_goes_on_with_the_clients_that_are_left() -> None:
    """Stopped after the third client of round 2; the other two are trained, and the run is the straight one."""
    straight = run(rounds=3)
    worker = Chairs()
    loop, _ = federation(rounds=3, worker=worker, stop=lambda: len(worker.trained) == 8)
    first = next(loop)
    with pytest.raises(Interrupted, match="round 2 with 3 clients done: run.resume=true") as caught:
        next(loop)
    again = Chairs()
    fleet = Waiting(Local(Silent()), caught.value.rnd, caught.value.finished)
    rest = run(fleet=fleet, worker=again, first=2, state=first.state, memories=first.memories, records=[first.record])
    assert again.trained == ["c3", "c4", "c0", "c1", "c2", "c3", "c4"]
    assert [strip(o.record) for o in [first, *rest]] == [strip(o.record) for o in straight]
    assert digest(rest[-1].state) == digest(straight[-1].state)


def test_waiting_clients_are_of_one_attempt_only() -> None:
    worker = Chairs()
    done = (Failed(CLIENTS[0], "It is down."), {})
    outcome = run(fleet=Waiting(Local(Silent()), Round(1, 0, rounds=1, attempt=1), [done]), worker=worker, rounds=1)[0]
    assert outcome.record["refused"] == {} and len(worker.trained) == 5


def test_ctrl_c_once_asks_and_twice_leaves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal within the echo is the first one again."""
    now = [100.0]
    monkeypatch.setattr("fedllm.fleets.interrupt.time.monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with once() as asked:
        assert not asked()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert asked() and capsys.readouterr().err.count("Ctrl-C again") == 1
        now[0] += ECHO + 0.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_is_taken_over() -> None:
    answers = []

    def body() -> None:
        with once() as asked:
            answers.append(asked())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert answers == [False]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("run.quorum=1.5", "run.quorum=1.5: give a number from 0 to 1"),
        ("run.attempts=0", "run.attempts=0"),
        ("run.deadline=0", "run.deadline=0"),
        ("admission.norm_bound=-1", "admission.norm_bound=-1"),
        ("admission.norm=1", "Did you mean admission.norm_bound"),
        ("robust.name=medain", "Did you mean median"),
        ("robust={name: clip, bound: 0}", "robust.bound=0"),
        ("robust={name: median, bound: 2}", "robust.bound"),
        ("faults.nann=0.5", "Did you mean faults.nan"),
        ("faults.nan=2", "faults.nan=2: give a number from 0 to 1"),
        ("faults={nan: 0.6, drop: 0.6}", "^faults: probabilities"),
        ("run.on_client_error=ignore", "run.on_client_error"),
    ],
)
def test_a_mistake_in_the_recipe_is_answered_before_anything_is_loaded(argument: str, words: str) -> None:
    with pytest.raises(FedError, match=words.replace("[", r"\[")):
        load(["recipe=smoke", argument])


def test_the_recipe_s_keys_become_the_policy() -> None:
    recipe = load(
        ["recipe=smoke", "run.quorum=0.5", "run.deadline=9", "admission.norm_bound=4", "robust={name: clip, bound: 3}"]
    )
    assert recipe.policy == Policy(0.5, 3, 9.0, 4.0, Clip(3.0))
    assert recipe.page["robust"] == {"name": "clip", "bound": 3.0} and recipe.page["faults"]["factor"] == 1e6
