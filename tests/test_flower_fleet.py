"""The fleet and the node, through real records and without Flower's programs."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("flwr")

from fake_grid import FakeGrid  # noqa: E402
from flower_lab import rehearsal, same_run  # noqa: E402

from fedllm.commands.join import LocalSeat  # noqa: E402
from fedllm.core import Failed, Job, LowRank, Round, StopAsked  # noqa: E402
from fedllm.errors import FedError  # noqa: E402
from fedllm.fleets.flower import api, notes, policy  # noqa: E402
from fedllm.fleets.flower.fleet import Flower, Roll, score_everywhere  # noqa: E402
from fedllm.fleets.flower.keys import Member  # noqa: E402
from fedllm.fleets.flower.node import Node, approve  # noqa: E402
from fedllm.fleets.flower.store import Store  # noqa: E402
from fedllm.fleets.local import Local  # noqa: E402
from fedllm.fleets.processes import Processes  # noqa: E402
from fedllm.progress import Silent  # noqa: E402
from fedllm.recipe import load  # noqa: E402
from fedllm.recipe.page import build  # noqa: E402
from fedllm.rounds import federate  # noqa: E402
from fedllm.train import train  # noqa: E402
from fedllm.wire.messages import pack, unpack  # noqa: E402
from fedllm.wire.serialization import canonical  # noqa: E402

SMALL = [
    *("recipe=smoke", "data.train_rows=24", "data.test_rows=4", "worker.steps=1", "worker.batch_size=1"),
    *("clients.rank=[4,2]", "eval.base=false", "eval.generate=false", "run.threads=1"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(api, "POLL", 0.005)


def node(folder: Path, client: str, **changes) -> Node:
    """A node in this process, with the policy of a rehearsal."""
    folder = folder / client
    folder.mkdir(exist_ok=True)
    page = {"client": client, "ask": "always", **rehearsal(), **changes}
    (folder / "policy.yaml").write_text(yaml.safe_dump(page))
    own = policy.load(folder / "policy.yaml")
    return Node(folder, own, lambda made: LocalSeat(made, client), say=lambda text: None)


def roll_of(grid: FakeGrid, page, members=None) -> Roll:
    told: list[str] = []
    roll = Roll(grid, members or {n.policy.client: Member() for n in grid.there.values()}, page, told.append)
    roll.told = told
    return roll


def settle(roll: Roll, count: int) -> None:
    """Until so many clients have said who they are."""
    for _ in range(20):
        roll.look()
    assert len(roll.declared) == count, roll.told


def played(folder: Path, arguments, grid: FakeGrid, stop=lambda: False, run="run") -> Path:
    """A run whose clients are the nodes of ``grid``."""
    recipe = load([*arguments, f"run.output={folder / 'far'}"])
    roll = roll_of(grid, recipe.page)
    settle(roll, len(grid.there))

    def lead(worker, display, asked):
        return worker, Flower(roll, run, Store(folder / "replies", 100), display, stop, recipe.run.deadline)

    train(recipe, Processes(), lead=lead)
    return folder / "far"


def near(folder: Path, arguments) -> Path:
    train(load([*arguments, f"run.output={folder / 'near'}"]), Processes())
    return folder / "near"


def two(folder: Path, **changes) -> FakeGrid:
    return FakeGrid({1: node(folder, "c0", **changes), 2: node(folder, "c1", **changes)})


RULES = {
    "fedhl": [],
    "flexlora": [],
    "flora": [],
    "zero_padding": [],
    "fedit": ["clients.rank=[4,4]"],
    "fedloru": ["clients.rank=[4,4]"],
    "pfedloru": ["clients.rank=[4,4]"],
}


@pytest.mark.parametrize("rule", [pytest.param(r, marks=[pytest.mark.slow] * (r != "fedhl")) for r in RULES])
def test_a_rule_across_machines_is_the_rule_in_one_process(rule, tmp_path):
    arguments = [*SMALL, f"algorithm.name={rule}", "worker.optimizer=kept", *RULES[rule]]
    grid = two(tmp_path)
    same_run(played(tmp_path, arguments, grid), near(tmp_path, arguments))
    assert len([note for note in grid.pushed if note["do"] == "train"]) == 4


@pytest.mark.slow
def test_a_network_is_trained_across_machines_too(tmp_path):
    arguments = ["recipe=vision_smoke", "run.threads=1", "run.rounds=2"]
    recipe = load(arguments)
    there = {
        n: node(
            tmp_path, f"c{n}", rank=0, data={"name": recipe.data_name, "deal": "recipe"},
            models=[recipe.model.name], rules=[recipe.algorithm_name],
        )
        for n in range(len(recipe.clients.ranks()))
    }  # fmt: skip
    far, simulated = played(tmp_path, arguments, FakeGrid(there)), near(tmp_path, arguments)
    (one,), (other,) = (list((run / "model").glob("*.safetensors")) for run in (far, simulated))
    assert one.read_bytes() == other.read_bytes()


def test_what_a_client_remembers_never_travels(tmp_path):
    """Every tensor of a memory is looked for, as bytes, in all that was sent either way."""
    grid = two(tmp_path)
    arguments = [*SMALL, "worker.optimizer=kept"]
    played(tmp_path, arguments, grid)
    kept = [unpack(path.read_bytes())[1]["memory"] for path in (tmp_path / "c0" / "memory").iterdir()]
    marks = [t.numpy().tobytes() for memory in kept for name, t in memory.items() if t.numel() > 64 and t.any()]
    assert len(kept) == 2 and len(marks) > 4
    everything = b"".join(grid.bodies)
    assert len(everything) > 10_000
    assert not any(mark in everything for mark in marks)


def test_a_job_that_is_pushed_twice_is_trained_once(tmp_path):
    """The first reply of each client is lost on its way, as when a SuperNode is killed after the training."""
    lost = set()

    def spoil(n, note, done):
        if note["do"] == "train" and note["key"] not in lost:
            lost.add(note["key"])
            return api.Answer(None, api.NODE_GONE, "Node Unavailable")
        return done

    grid = two(tmp_path)
    grid.spoil = spoil
    same_run(played(tmp_path, SMALL, grid), near(tmp_path, SMALL))
    assert len([n for n in grid.pushed if n["do"] == "train"]) == 8
    assert (tmp_path / "c0" / "log.jsonl").read_text().count("\n") == 2  # a line a training


@pytest.mark.slow
def test_a_restarted_node_is_asked_again_and_answers_from_its_disk(tmp_path):
    """It has lost the message and its process, not its folder."""
    grid, hung = two(tmp_path), []

    def spoil(n, note, done):
        if note["do"] == "train" and n == 1 and not hung:
            hung.append(note["key"])
            grid.there[1] = node(tmp_path, "c0")
            grid.activated[1] = 1e12
            return None
        return done

    grid.spoil = spoil
    same_run(played(tmp_path, SMALL, grid), near(tmp_path, SMALL))
    assert (tmp_path / "c0" / "log.jsonl").read_text().count("\n") == 2


def test_a_server_that_died_takes_what_it_had_received(tmp_path):
    """The second run of the same name finds the replies of round 1 in its own folder, and asks nobody."""
    recipe = load(SMALL)
    federation = LocalSeat(dict(recipe.page), "c0")._federation
    state = recipe.algorithm.init(federation.model, federation.clients)
    rnd = Round(1, 0, rounds=2)
    jobs = [Job(c, recipe.algorithm.download(state, c, rnd), {}) for c in federation.clients]
    digests = []
    for _ in range(2):
        grid = two(tmp_path)
        roll = roll_of(grid, recipe.page)
        fleet = Flower(roll, "run", Store(tmp_path / "replies", 100), Silent())
        done = list(fleet.run(recipe.algorithm, None, jobs, rnd))
        digests.append([notes.digest(reply.returned) for reply, _ in done])
        trained = [note for note in grid.pushed if note["do"] == "train"]
    assert digests[0] == digests[1]
    assert trained == []


def one_round(tmp_path, spoil, *, stop=lambda: False, deadline=None, arguments=SMALL):
    """How round 1 ended for each client."""
    recipe = load(arguments)
    federation = LocalSeat(dict(recipe.page), "c0")._federation
    state = recipe.algorithm.init(federation.model, federation.clients)
    rnd = Round(1, 0, rounds=2)
    jobs = [Job(c, recipe.algorithm.download(state, c, rnd), {}) for c in federation.clients]
    grid = two(tmp_path)
    grid.spoil = spoil
    fleet = Flower(roll_of(grid, recipe.page), "run", Store(tmp_path / "replies", 9), Silent(), stop, deadline)
    return [ended for ended, _ in fleet.run(recipe.algorithm, None, jobs, rnd)]


def test_a_client_that_does_not_answer_has_failed_at_the_deadline(tmp_path):
    hang = lambda n, note, done: None if note["do"] == "train" and n == 1 else done  # noqa: E731
    first, second = one_round(tmp_path, hang, deadline=2.0)
    assert first == Failed(first.client, "no answer within 2 s")
    assert not isinstance(second, Failed)


def test_a_stop_is_heard_while_a_client_hangs(tmp_path):
    asked = threading.Event()
    threading.Timer(1.0, asked.set).start()
    with pytest.raises(StopAsked):
        one_round(tmp_path, lambda n, note, done: None if note["do"] == "train" else done, stop=asked.is_set)


BAD = {
    "no message": (lambda done: api.Answer(api.RecordDict()), "its reply could not be read: it is no message"),
    "a picture": (lambda done: (done[0], b"\x89PNG" * 100), "its reply could not be read"),
    "too large": (lambda done: (done[0], done[1] + bytes(10 << 20)), "are the most"),
    "cut": (lambda done: (done[0], done[1][:-8]), "its reply could not be read"),
    "no update": (lambda done: (done[0], pack({}, {"other": {}})), "its reply could not be read: 'returned'"),
    "refused": (lambda done: ({"refused": "no\nthanks\x1b[31m"}, b""), "no thanks [31m"),
    "memory elsewhere": (lambda done: ({**done[0], "memory": "../../etc"}, done[1]), "has no name"),
    "foreign bundle": (lambda done: api.Answer(None, api.FOREIGN, "no code"), "Flower's error 7: no code"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_reply_that_is_none_is_its_clients_failure_alone(kind, tmp_path):
    spoil, words = BAD[kind]
    first, second = one_round(tmp_path, lambda n, note, done: spoil(done) if note["do"] == "train" and n == 1 else done)
    assert isinstance(first, Failed) and words in first.reason
    assert not isinstance(second, Failed)


def test_a_hostile_update_is_refused_and_the_state_is_the_one_without_it(tmp_path):
    """NaN in round 1, a wrong rank in round 2: each time the state is that of a run where the client was silent."""

    def hostile(n, note, done):
        if note["do"] != "train" or n != 1 or not done[1]:
            return done
        returned = unpack(done[1])[1]["returned"]
        if note["round"]["index"] == 1:
            bad = {name: LowRank(value.B * float("nan"), value.A) for name, value in returned.items()}
        else:
            bad = {name: LowRank(value.B[:, :1], value.A[:1]) for name, value in returned.items()}
        return done[0], pack({}, {"returned": bad})

    def silent(n, note, done):
        return ({"failed": "nothing"}, b"") if note["do"] == "train" and n == 1 else done

    runs = []
    for name, spoil in (("hostile", hostile), ("silent", silent)):
        folder = tmp_path / name
        folder.mkdir()
        grid = two(folder)
        grid.spoil = spoil
        runs.append(played(folder, SMALL, grid))
    same_run(*runs)
    refused = [json.loads(line)["refused"]["c0"] for line in (runs[0] / "rounds.jsonl").read_text().splitlines()]
    assert "finite" in refused[0] and "rank" in refused[1]


def test_metrics_from_another_machine_are_finite_numbers_or_dropped(tmp_path):
    told = {
        "train_loss": 1.5,
        "steps": True,
        "seconds": float("inf"),
        "a b": 1.0,
        "x" * 99: 2.0,
        "own_loss": 3,
        "t": "u",
    }
    assert notes.read_metrics(told) == {"train_loss": 1.5, "own_loss": 3}
    assert notes.read_metrics(["train_loss"]) == {}


def members(**keys):
    return {id: Member(key) for id, key in keys.items()}


def test_a_node_cannot_take_another_clients_id(tmp_path, monkeypatch):
    """Its key is c1's, and it says that it is c0."""
    from fedllm.fleets.flower import fleet

    monkeypatch.setattr(fleet, "clients_by_key", lambda members: {b"one": "c0", b"two": "c1"})
    grid = FakeGrid({2: node(tmp_path, "c0")}, keys={2: b"two"})
    roll = roll_of(grid, load(SMALL).page, members(c0="one", c1="two"))
    for _ in range(3):
        roll.look()
    assert roll.declared == {}
    assert any("it says that it is c0, and its key is c1's" in line for line in roll.told)


@pytest.mark.parametrize("bounds, words", [({"most_rows": 5}, "most_rows is 5"), ({"most_rank": 2}, "most_rank is 2")])
def test_claims_are_bounded_by_the_server(bounds, words, tmp_path):
    grid = FakeGrid({1: node(tmp_path, "c0")})
    roll = roll_of(grid, load(SMALL).page, {"c0": Member(**bounds)})
    for _ in range(3):
        roll.look()
    assert roll.declared == {} and any(words in line for line in roll.told)


def test_scores_on_nodes_are_weighted_by_rows_and_only_where_policies_allow(tmp_path):
    grid = FakeGrid({1: node(tmp_path, "c0", score=True), 2: node(tmp_path, "c1")})
    roll = roll_of(grid, load(SMALL).page)
    settle(roll, 2)
    scores = score_everywhere(roll, {}, 30.0, lambda: False)
    seat = grid.there[1].take(policy.node_page(grid.there[1].policy, load(SMALL).page))
    assert scores["nodes_loss"] == pytest.approx(seat.score({})["loss"])
    assert [note["node"] for note in grid.pushed if note["do"] == "score"] == [1]


def write_rows(path: Path, words: list[str]) -> None:
    rows = [{"instruction": f"say {w}", "input": "", "output": f"{w} {w}"} for w in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def own_rows(folder: Path, client: str, words: list[str]) -> Node:
    """A node whose rows are a file of its own."""
    folder = folder / client
    folder.mkdir()
    write_rows(folder / "rows.jsonl", words)
    (folder / "policy.yaml").write_text(
        yaml.safe_dump(
            {"client": client, "ask": "always", "rank": 4, "models": ["pico"], "rules": ["fedhl"]}
            | {"data": {"name": "alpaca", "path": str(folder / "rows.jsonl"), "held_out": 1}}
        )
    )
    own = policy.load(folder / "policy.yaml")
    return Node(folder, own, lambda made: LocalSeat(made, client, own.dealt), say=lambda text: None)


def test_clients_with_rows_of_their_own_are_who_they_say(tmp_path):
    """The server has two held-out rows and no other; ids, rows and ranks are the nodes', each draws by its own id."""
    from fedllm.commands.serve import _declared

    held = tmp_path / "held.jsonl"
    write_rows(held, list("xy"))
    arguments = [
        *("recipe=smoke", "data.name=alpaca", f"data.path={held}", "data.held_out=1", "run.threads=1"),
        *("worker.steps=1", "eval.generate=false", "worker.optimizer=kept", f"run.output={tmp_path / 'far'}"),
    ]
    there = {1: own_rows(tmp_path, "mayo", list("abcd")), 2: own_rows(tmp_path, "charite", list("efghij"))}
    recipe = load(arguments)
    roll = roll_of(FakeGrid(there), recipe.page)
    settle(roll, 2)
    federation = _declared(recipe, roll.declared)
    assert [(c.id, c.num_samples, c.rank) for c in federation.clients] == [("charite", 5, 4), ("mayo", 3, 4)]

    def lead(worker, display, asked):
        return worker, Flower(roll, "run", Store(tmp_path / "replies", 9), display)

    train(recipe, Processes(), federation=federation, lead=lead, notes_of=roll.notes)

    class Seats:
        """The same two seats, in one process."""

        def of(self, client):
            (node,) = [n for n in there.values() if n.policy.client == client.id]
            return next(iter(node._seats.values())).worker().of(client)

    outcomes = list(
        federate(
            recipe.algorithm, federation.clients, Seats(), Local(Silent()), Silent(),
            state=canonical(recipe.algorithm.init(federation.model, federation.clients)), memories={}, first=1,
            rounds=2, seed=recipe.run.seed,
        )
    )  # fmt: skip
    near = {id: c["digest"] for id, c in outcomes[-1].record["clients"].items()}
    last = json.loads((tmp_path / "far" / "rounds.jsonl").read_text().splitlines()[-1])
    assert near == {id: c["digest"] for id, c in last["clients"].items()}
    report = (tmp_path / "far" / "report.md").read_text()
    assert "Across machines: 2 clients on Flower" in report and "jobs were sent again" in report


# The node


def hello(page) -> dict:
    return {"do": "hello", "recipe": notes.public_page(page), "versions": notes.versions()}


@pytest.mark.parametrize(
    "changes, words",
    [
        (["model.name=/srv/x"], "model /srv/x is not one of its policy's models: pico"),
        (["clients.rank=[1000000,2]"], "c0 has rank 1000000"),
        (["worker.steps=100000"], "worker.steps=100000: its policy allows 1000 at most"),
        (["run.rounds=5000"], "run.rounds=5000: its policy allows 1000 at most"),
        (["worker.max_length=5000"], "worker.max_length=5000: its policy allows 4096"),
        (["algorithm.name=ffa_lora"], "algorithm.name=ffa_lora: its policy's rules are"),
    ],
)
def test_a_page_beyond_the_policy_is_refused_in_hello(changes, words, tmp_path):
    """Before a weight is loaded: the seat's worker is never made."""
    page = load([*SMALL, *changes]).page
    answer, _ = node(tmp_path, "c0").handle(hello(page), b"")
    assert words in answer["refused"]


def test_a_server_names_no_path_and_no_program(tmp_path):
    """Every file that is opened and every connection that is tried, by Python's audit hook, while hello is answered."""
    page = notes.public_page(load(SMALL).page)
    page["data"] |= {"path": "/etc/passwd"}
    page["run"] |= {"output": "/srv/out", "tracker": "wandb", "parallel": "fsdp"}
    page["eval"] |= {"allow_code_execution": True, "generate": True, "accept_missing": ["network"]}
    page["hub"] = {"push": True, "repo": "a/b"}
    page["faults"] = {"drop": 1.0}
    page["surprise"] = {"x": 1}
    opened: list[str] = []
    watching = True

    def hook(event, given):
        if watching and event in ("open", "socket.connect", "subprocess.Popen", "os.system", "exec"):
            opened.append(f"{event} {given[0] if event != 'exec' else ''}")

    one = node(tmp_path, "c0")
    sys.addaudithook(hook)
    answer, _ = one.handle({"do": "hello", "recipe": page, "versions": notes.versions()}, b"")
    watching = False
    assert answer["client"]["id"] == "c0"
    touched = [line for line in opened if "passwd" in line or "/srv" in line or not line.startswith(("open", "exec"))]
    assert touched == []
    made = policy.node_page(one.policy, page)
    assert "path" not in made["data"] and "output" not in made["run"] and "hub" not in made
    recipe = build("node", made)
    assert not recipe.eval.generate and not recipe.eval.allow_code_execution and recipe.run.tracker == "none"


def test_an_unknown_key_of_a_page_is_refused(tmp_path):
    page = notes.public_page(load(SMALL).page)
    page["worker"] |= {"exec": "rm"}
    answer, _ = node(tmp_path, "c0").handle({"do": "hello", "recipe": page, "versions": notes.versions()}, b"")
    assert "worker.exec is not a key of a recipe" in answer["refused"]


def test_a_person_approves_a_recipe_once(tmp_path):
    page = load(SMALL).page
    one = node(tmp_path, "c0", ask="first")
    answer, _ = one.handle(hello(page), b"")
    digest = notes.recipe_digest(page)
    assert answer["refused"] == f"its owner has to approve the recipe first (digest {digest})."
    with pytest.raises(FedError, match="no digest of a recipe"):
        approve(one.folder, "../x")
    approve(one.folder, digest)
    assert one.handle(hello(page), b"")[0]["client"]["id"] == "c0"
    other = load([*SMALL, "worker.learning_rate=1.0"]).page
    assert "approve" in one.handle(hello(other), b"")[0]["refused"]


@pytest.mark.parametrize(
    "note, body",
    [
        ({}, b""),
        ({"do": ["hello"]}, b""),
        ({"do": "hello"}, b""),
        ({"do": "hello", "recipe": "x"}, b""),
        ({"do": "hello", "recipe": {"algorithm": 3}}, b""),
        ({"do": "train"}, b""),
        ({"do": "train", "key": "../../x", "recipe": "y", "round": {}}, b""),
        ({"do": "train", "key": "0" * 32, "recipe": "y", "round": {}}, b""),
        ({"do": "train", "key": "0" * 32, "recipe": "../../policy.yaml", "round": {}}, b""),
        ({"do": "score", "recipe": None}, b""),
        ({"do": "exec", "code": "1"}, b""),
    ],
)
def test_a_message_that_is_none_is_answered_in_one_sentence(note, body, tmp_path):
    answer, payload = node(tmp_path, "c0").handle(note, body)
    assert set(answer) == {"refused"} and payload == b"" and "\n" not in answer["refused"]


def test_a_reason_leaves_the_node_without_a_row_in_it(tmp_path, monkeypatch):
    page = load(SMALL).page
    one = node(tmp_path, "c0")
    one.handle(hello(page), b"")
    seat = next(iter(one._seats.values()))

    class Broken:
        def of(self, client):
            raise ValueError("patient Ann has AB-")

    monkeypatch.setattr(seat, "worker", Broken)
    job = {
        "do": "train", "key": "0" * 32, "recipe": notes.recipe_digest(page), "memory": "",
        "round": dataclasses.asdict(Round(1, 0)),
    }  # fmt: skip
    answer, _ = one.handle(job, pack({}, {"sent": {"x": torch.zeros(1)}}))
    assert answer["failed"] == "its training ended in ValueError"


def test_a_memory_that_is_gone_is_that_rounds_failure(tmp_path):
    page = load(SMALL).page
    one = node(tmp_path, "c0")
    one.handle(hello(page), b"")
    job = {
        "do": "train", "key": "1" * 32, "recipe": notes.recipe_digest(page), "memory": "2" * 32,
        "round": dataclasses.asdict(Round(2, 0)),
    }  # fmt: skip
    assert one.handle(job, pack({}, {"sent": {"x": torch.zeros(1)}}))[0]["failed"] == "what it remembered is gone"


def test_other_versions_are_refused_and_a_patch_is_noted():
    here = {"torch": "2.13.0", "peft": "0.21.2"}
    assert notes.version_sentence(here, {"torch": "2.12.0", "peft": "0.21.2"})[0] == "torch 2.12.0 there, 2.13.0 here"
    assert notes.version_sentence(here, {"torch": "2.13.1", "peft": "0.21.2"}) == (
        "",
        "torch 2.13.1 there, 2.13.0 here",
    )
    assert notes.version_sentence(here, {"torch": "2.13.0"})[0] == "peft missing there, 0.21.2 here"


def test_stores_keep_the_newest_and_take_no_path(tmp_path):
    store = Store(tmp_path / "s", 2)
    for k in range(3):
        store.put(f"{k}" * 32, b"x")
    assert store.get("0" * 32) is None and store.get("2" * 32) == b"x"
    (tmp_path / "s" / ("a" * 32)).symlink_to("/etc/passwd")
    assert store.get("a" * 32) is None and store.get("../policy.yaml") is None
    assert (tmp_path / "s" / ("2" * 32)).stat().st_mode & 0o077 == 0


def test_a_dry_run_says_what_hello_will_say_and_leaves_nothing(tmp_path, monkeypatch):
    from fedllm.commands import join

    one = node(tmp_path, "c1", ask="first")
    (tmp_path / "c1" / "policy.yaml").write_text((tmp_path / "c1" / "policy.yaml").read_text())
    before = sorted(path.name for path in one.folder.iterdir())
    told = join.dry_run(one.folder, SMALL)
    digest = notes.recipe_digest(load(SMALL).page)
    assert sorted(path.name for path in one.folder.iterdir()) == before
    assert f"fedllm join approve {one.folder} {digest}" in told
    approve(one.folder, digest)
    answer, _ = one.handle(hello(load(SMALL).page), b"")
    rows, rank, steps = answer["client"]["num_samples"], answer["client"]["rank"], answer["steps"]
    told = join.dry_run(one.folder, SMALL)
    assert told == f"c1 takes part in recipe {digest}: {rows} rows, rank {rank}, {steps} steps a round."
    refused, _ = one.handle(hello(load([*SMALL, "worker.steps=9999"]).page), b"")
    assert join.dry_run(one.folder, [*SMALL, "worker.steps=9999"]) == f"c1 does not take part: {refused['refused']}"


def test_without_flower_the_two_commands_say_what_to_install(monkeypatch, capsys):
    from importlib.metadata import PackageNotFoundError

    from fedllm.cli import main
    from fedllm.fleets import flower

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(flower, "version", missing)
    for words in (["serve", "x", "smoke"], ["join", "x"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "need Flower: pip install -c constraints.txt '.[flower]'" in error and error.count("\n") == 1
    assert main(["ls", "methods"]) == 0


def test_no_other_command_imports_flower():
    """A user without it must be able to train."""
    import subprocess

    program = (
        "import sys; import fedllm.cli, fedllm.train, fedllm.federation.declared; "
        "print([name for name in sys.modules if name.split('.')[0] in ('flwr', 'starlette', 'uvicorn')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.strip() == "[]"
