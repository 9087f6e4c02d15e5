"""Rules that leave every client a network of its own: laws over all of them, what they equal, and numbers by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedllm import cli, train
from fedllm.algorithms import PRIVATE
from fedllm.algorithms.own_models.class_means import class_means
from fedllm.algorithms.own_models.fd import FD
from fedllm.algorithms.own_models.fedkd import FedKD, compressed, decompressed
from fedllm.algorithms.own_models.fedlora import FedLoRA
from fedllm.algorithms.own_models.fedproto import FedProto, nearness
from fedllm.algorithms.own_models.fml import FML
from fedllm.algorithms.own_models.lg_fedavg import LGFedAvg
from fedllm.algorithms.own_models.standalone import Standalone
from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors, within
from fedllm.errors import FedError
from fedllm.federation.build import build_federation
from fedllm.lowrank import LowRank
from fedllm.models.build import drawn
from fedllm.models.flops import sizes
from fedllm.models.network import Network
from fedllm.recipe import page as recipe
from fedllm.server.admission import admit, suspects
from fedllm.server.robust import Clip, Krum, Median, TrimmedMean
from fedllm.structure import Features
from fedllm.tasks.images import Prototypes
from fedllm.wire import serialization as ledger
from fedllm.workers.settings import Vision
from fedllm.workers.vision import VisionWorker

TASK = Prototypes(sigma=0.7, train_rows=80, test_rows=40, side=8)
EXAMPLES = {split: TASK.load(None, split, None, 0) for split in ("train", "test")}
OWN = tuple(f"cnn{kind}" for kind in range(1, 6))
CLIENTS = [Client(f"c{i}", 0, level=OWN[i % 5]) for i in range(6)]
ENDS = (0, 10, 24, 40, 50, 64, 80)

RULES: dict[str, Algorithm] = {
    **{name: rule() for name, rule in PRIVATE.items()},
    "standalone, always": Standalone(trains="always"),
    "fd, raw": FD(answers="raw", coefficient=0.1),
    "fd, others": FD(teachers="others"),
    "fedkd, half": FedKD(energy=0.5, final_energy=0.6),
}
"""The whole table, and the options that change what travels."""

EVERY = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))


def model_of(name: str, classes: int = 10, plan: bool = False) -> Model:
    make = Network(name=name).maker("plain", classes)
    net, draw = make(), lambda described: drawn(described, Round(0, 3).rng("initial"))
    values = dict(net.state_dict()) if plan else draw(net)
    return Model(values, anatomy=net.anatomy(), make=make, draw=draw, classes=classes)


def bench() -> tuple[VisionWorker, list[Client]]:
    """Six clients with five kinds of networks, unequal shares of a few generated images, and a CNN-5 that is shared."""
    parts = {c.id: list(range(a, b)) for c, a, b in zip(CLIENTS, ENDS, ENDS[1:], strict=False)}
    worker = VisionWorker(
        Vision(batch_size=8, learning_rate=0.05),
        TASK,
        model_of("cnn5"),
        EXAMPLES["train"],
        EXAMPLES["test"],
        parts,
        {c.id: list(range(6 * i, 6 * i + 6)) for i, c in enumerate(CLIENTS)},
        3,
        torch.device("cpu"),
        own={name: model_of(name) for name in OWN},
    )
    return worker, [dataclasses.replace(c, num_samples=len(parts[c.id])) for c in CLIENTS]


def played(
    rule: Algorithm, cohorts: Sequence[Sequence[int]]
) -> tuple[list[Tensors], dict[str, Tensors], dict[str, Tensors], list[Reply]]:
    """The states, the memories, every client's own network and the last replies after a round for each cohort."""
    worker, clients = bench()
    states: list[Tensors] = [ledger.canonical(rule.init(worker.model, clients))]
    memories: dict[str, Tensors] = {}
    own: dict[str, Tensors] = {}
    replies: list[Reply] = []
    for index, cohort in enumerate(cohorts, start=1):
        rnd, replies = Round(index, seed=3, rounds=3), []
        for client in [clients[i] for i in cohort]:
            sent = ledger.canonical(rule.download(states[-1], client, rnd))
            returned, memory, metrics = rule.local(worker.of(client), sent, memories.get(client.id, {}), rnd)
            memories[client.id] = ledger.canonical(memory)
            replies.append(Reply(client, sent, ledger.canonical(returned), metrics))
            own[client.id] = ledger.canonical(rule.personal(replies[-1], memories[client.id]))
        kept, refused = admit(replies, rule.expected)
        assert not refused
        states.append(ledger.canonical(rule.aggregate(states[-1], kept, rnd)))
    return states, memories, own, replies


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in ledger.flatten(tensors).items()}


# --- laws over the whole table


@EVERY
def test_everybody_trains_a_network_of_their_own_kind(rule: Algorithm) -> None:
    """Replies of five kinds of networks are admitted; the state keeps its shapes; own scores are reported."""
    states, _, own, replies = played(rule, [[0, 1, 2], [3, 4, 5], [0, 2, 4]])
    for client in CLIENTS:
        start = model_of(client.level).weights
        assert {name: W.shape for name, W in own[client.id].items()} == {name: W.shape for name, W in start.items()}
        assert any(not torch.equal(W, start[name]) for name, W in own[client.id].items())
    assert len({tuple((name, tuple(W.shape)) for name, W in state.items()) for state in states}) == 1
    assert all(0 <= reply.metrics["own_accuracy"] <= 1 for reply in replies)
    assert all(math.isfinite(reply.metrics["train_loss"]) for reply in replies)


@EVERY
def test_hooks_change_nothing_they_were_given_nor_the_global_generator(rule: Algorithm) -> None:
    worker, clients = bench()
    state, rnd = played(rule, [[0, 1, 5]])[0][-1], Round(2, seed=3, rounds=3)
    generator, given = torch.get_rng_state(), bits(state)
    initial = {name: bits(model.weights) for name, model in worker.own.items()}
    sent = [ledger.canonical(rule.download(state, client, rnd)) for client in clients]
    sent_bits = [bits(payload) for payload in sent]
    memories = [rule.local(worker.of(c), payload, {}, rnd)[1] for c, payload in zip(clients, sent, strict=True)]
    memory_bits = [bits(memory) for memory in memories]
    replies = [
        Reply(client, payload, rule.local(worker.of(client), payload, memory, rnd)[0])
        for client, payload, memory in zip(clients, sent, memories, strict=True)
    ]
    returned_bits = [bits(reply.returned) for reply in replies]
    after = rule.aggregate(state, replies, rnd)
    rule.served(after)
    assert sum(rule.shares(state, replies).values()) == pytest.approx(1)
    assert (bits(state), [bits(p) for p in sent], [bits(m) for m in memories]) == (given, sent_bits, memory_bits)
    assert [bits(reply.returned) for reply in replies] == returned_bits
    assert {name: bits(model.weights) for name, model in worker.own.items()} == initial
    assert torch.equal(torch.get_rng_state(), generator)


@EVERY
def test_the_order_of_clients_changes_nothing(rule: Algorithm) -> None:
    states, _, _, replies = played(rule, [[0, 1, 2, 3, 4, 5]])
    rnd = Round(1, seed=3, rounds=3)
    for name, W in rule.aggregate(states[0], replies[::-1], rnd).items():
        torch.testing.assert_close(W, states[1][name], rtol=1e-5, atol=1e-6)


@EVERY
def test_clients_that_are_not_drawn_keep_their_networks(rule: Algorithm) -> None:
    before, after = (played(rule, cohorts)[2]["c0"] for cohorts in ([[0, 1]], [[0, 1], [2, 3]]))
    name = next(name for name, W in before.items() if W.ndim == 4)
    assert torch.equal(before[name], after[name])


@EVERY
def test_nothing_sent_is_nothing_suspicious(rule: Algorithm) -> None:
    replies = played(rule, [[0, 1, 2], [0, 1, 2]])[3]
    digests = {reply.client.id: ledger.digest(reply.returned) for reply in replies}
    assert suspects(replies, rule.expected, {}, digests) == {}


# --- what equals what


@pytest.mark.parametrize(
    "rule",
    [
        FedLoRA(mu=1.0),
        FML(a=1.0),
        FD(coefficient=0.0),
        FD(coefficient=0.0, answers="raw"),
        FedProto(coefficient=0.0),
    ],
    ids=["fedlora, mu=1", "fml, a=1", "fd, 0", "fd raw, 0", "fedproto, 0"],
)
def test_without_what_is_shared_it_is_standalone_to_the_bit(rule: Algorithm) -> None:
    """Every client's own network, through three rounds of partial participation."""
    cohorts = [[0, 1, 2, 5], [3, 4, 5], [0, 1, 3, 4]]
    wanted, given = played(Standalone(), cohorts)[2], played(rule, cohorts)[2]
    assert {id: bits(omega) for id, omega in given.items()} == {id: bits(omega) for id, omega in wanted.items()}


@pytest.mark.parametrize("rule", [FedLoRA(mu=0.5), FML(), FedKD(), FD(), FedProto(), LGFedAvg()], ids=repr)
def test_with_what_is_shared_it_is_not(rule: Algorithm) -> None:
    cohorts = [[0, 1, 2], [0, 1, 2]]
    wanted, given = played(Standalone(), cohorts)[2], played(rule, cohorts)[2]
    for id, omega in wanted.items():
        assert bits(given[id]) != bits(omega)


def test_standalone_always_is_standalone_where_everybody_takes_part_in_every_round() -> None:
    """c1 is drawn in rounds 1 and 3 of three; what it missed costs as much as what it does when it is drawn."""
    drawn = [[0, 1, 2], [0, 2], [0, 1]]
    everybody = played(Standalone(), [[0, 1, 2]] * 3)
    always, seldom = (played(Standalone(trains=trains), drawn) for trains in ("always", "drawn"))
    assert bits(always[2]["c1"]) == bits(everybody[2]["c1"]) != bits(seldom[2]["c1"])
    assert bits(always[2]["c0"]) == bits(everybody[2]["c0"]) == bits(seldom[2]["c0"])
    for cost in ("steps", "flops"):
        c0, c1 = (reply.metrics[cost] / everybody[3][i].metrics[cost] for i, reply in enumerate(always[3]))
        assert (c0, c1) == (1, 2)
    assert always[3][1].metrics["train_loss"] == everybody[3][1].metrics["train_loss"]


def test_what_training_costs() -> None:
    """LG-FedAvg trains what Standalone trains; FedLoRA's second pass has no backward through the network; FML has two.

    Class statistics are no products, and cost nothing.
    """
    replies = {name: played(rule(), [[2]])[3] for name, rule in PRIVATE.items()}
    flops = {name: reply.metrics["flops"] for name, (reply,) in replies.items()}
    assert flops["standalone"] == flops["lg_fedavg"] == flops["fd"] == flops["fedproto"]
    assert flops["standalone"] < flops["fedlora"] < 2 * flops["standalone"]
    assert flops["fml"] > flops["standalone"] + 0.5 * flops["standalone"]
    assert flops["fedkd"] > flops["fml"]


class Watched:
    """A seat that compares, after every ``train``, the frozen weights inside the network with those that were given."""

    def __init__(self, seat: Any) -> None:
        self.seat, self.steps = seat, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.seat, name)

    def train(self, sent: Tensors, memory: Tensors, rnd: Round, **how: Any) -> Any:
        nets: list[Any] = []
        forward = how.pop("forward")
        trained = self.seat.train(sent, memory, rnd, forward=lambda net, x: nets.append(net) or forward(net, x), **how)
        held = nets[-1].state_dict()
        kept = all(torch.equal(held[name], W) for name, W in how["frozen"].items())
        moved = {name for name, W in sent.items() if not torch.equal(trained[0][name], W)}
        self.steps.append((set(sent), set(how["frozen"]), kept, moved))
        return trained


@pytest.mark.parametrize("mu", [0.5, 1.0])
def test_step_1_leaves_the_adapter_and_step_2_the_network(mu: float) -> None:
    worker, clients = bench()
    rule, rnd = FedLoRA(mu=mu), Round(1, seed=3, rounds=3)
    seat = Watched(worker.of(clients[1]))
    sent = rule.download(rule.init(worker.model, clients), clients[1], rnd)
    theta, omega, _ = rule.local(seat, sent, {}, rnd)
    (own, frozen_1, kept_1, moved_1), (adapter, frozen_2, kept_2, moved_2) = seat.steps
    assert kept_1 and kept_2
    assert own == frozen_2 == {f"own.{name}" for name in omega}
    assert adapter == frozen_1 == {f"adapter.{name}" for name in theta} == moved_2
    assert moved_1 == own


def test_the_smaller_mu_the_more_the_adapter_steers() -> None:
    """At mu = 0 the network's own last layer gets no gradient and only decays; the layers before it learn."""
    own = played(FedLoRA(mu=0.0), [[0]])[2]["c0"]
    start = model_of("cnn1").weights
    decay = 1 - 0.05 * 5e-4
    assert float((own["head.fc.weight"] - decay * start["head.fc.weight"]).norm()) < 1e-3 * float(
        start["head.fc.weight"].norm()
    )
    assert float((own["convs.4.weight"] - start["convs.4.weight"]).norm()) > 1e-2


# --- numbers by hand


def statistics_reply(id: str, known: Sequence[bool], seen: Tensor, rows: Sequence[Sequence[float]]) -> Reply:
    sent = {"known": torch.tensor(known), "rows": torch.full((sum(known), 2), 9.0)}
    return Reply(Client(id, 4), sent, {"seen": seen, "rows": torch.tensor(rows).float()})


def test_prototypes_are_weighted_by_examples_and_fd_s_answers_by_clients() -> None:
    """Class 1: 3 examples at (0, 2), 1 at (4, 2): (0 3 + 4 1) / 4 = 1; as clients (0 + 4) / 2 = 2. Class 2 keeps 9."""
    state = {"known": torch.tensor([False, False, True]), "rows": torch.tensor([[0.0, 0], [0, 0], [9, 9]])}
    for rule, dtype, wanted in ((FedProto(), torch.int64, 1.0), (FD(), torch.bool, 2.0)):
        a = statistics_reply("a", [False, False, True], torch.tensor([1, 3, 0]).to(dtype), [[1, 0], [0, 2]])
        b = statistics_reply("b", [False, False, True], torch.tensor([0, 1, 0]).to(dtype), [[4, 2]])
        kept, refused = admit([a, b], rule.expected)
        assert len(kept) == 2 and not refused
        after = rule.aggregate(state, kept, Round(1, 0))
        assert after["known"].tolist() == [True, True, True]
        assert after["rows"].tolist() == [[1, 0], [wanted, 2], [9, 9]]


def test_fd_leaves_a_client_s_own_answers_out_of_what_it_is_sent() -> None:
    """Round 1: class 0 from a (1, 0) and b (0, 1), class 1 from a alone. Round 2: class 0 from c alone.

    To a: b's class 0, then c's, and never class 1, which only a has had. To c: the mean (.5, .5), then no class 0.
    """
    rule, clients = FD(teachers="others"), [Client(id, 4) for id in "abc"]
    state = rule.init(model_of("cnn1", classes=2), clients)

    def reply(id: str, seen: list[bool], rows: list[list[float]]) -> Reply:
        return Reply(Client(id, 4), {}, {"seen": torch.tensor(seen), "rows": torch.tensor(rows)})

    def sent(id: str) -> dict[int, list[float]]:
        got = rule.download(state, Client(id, 4), Round(2, 0))
        return dict(zip(got["known"].nonzero().flatten().tolist(), got["rows"].tolist(), strict=True))

    assert [sent(id) for id in "abc"] == [{}, {}, {}]
    first = [reply("a", [True, True], [[1.0, 0.0], [0.0, 1.0]]), reply("b", [True, False], [[0.0, 1.0]])]
    state = rule.aggregate(state, first, Round(1, 0))
    assert [sent(id) for id in "abc"] == [{0: [0, 1]}, {0: [1, 0], 1: [0, 1]}, {0: [0.5, 0.5], 1: [0, 1]}]
    state = rule.aggregate(state, [reply("c", [True, False], [[0.25, 0.75]])], Round(2, 0))
    assert [sent(id) for id in "abc"] == [{0: [0.25, 0.75]}, {0: [0.25, 0.75], 1: [0, 1]}, {1: [0, 1]}]
    assert within("shared", rule.served(state))["rows"].tolist() == [[0.25, 0.75], [0, 1]]


def test_the_nearest_prototype_answers() -> None:
    """R = (0, 0) is nearest to class 1 at (1, 0), 4 from class 2 at (2, 0); class 0 lies at 0 but has no prototype."""

    class Shown(torch.nn.Module):
        def features(self, x: Tensor) -> Features:
            return Features(x, x, x)

    prototypes, has = torch.tensor([[0.0, 0], [1, 0], [2, 0]]), torch.tensor([False, True, True])
    z = nearness(Shown(), torch.zeros(1, 2), prototypes, has)
    assert z.tolist() == [[-math.inf, -1, -4]]
    for reply in played(FedProto(), [[0, 1, 2], [0, 3]])[3]:
        assert 0 <= reply.metrics["own_prototype_accuracy"] <= 1


def test_class_statistics_that_do_not_fit_are_refused() -> None:
    fitting = statistics_reply("a", [True, False], torch.tensor([1, 2]), [[1, 0], [0, 2]])
    rows, seen = fitting.returned["rows"], fitting.returned["seen"]
    for wrong in (
        {"seen": seen, "rows": rows[:1]},
        {"seen": torch.tensor([1, -2]), "rows": rows},
        {"seen": torch.tensor([1, 2, 1]), "rows": rows},
        {"seen": seen.float(), "rows": rows},
        {"rows": rows},
        {"seen": seen, "rows": torch.tensor([[1, float("nan")], [0, 2]])},
        {"seen": seen, "rows": torch.zeros(2, 3)},
    ):
        assert admit([dataclasses.replace(fitting, returned=wrong)], FedProto().expected)[0] == []
    assert admit([fitting], FedProto().expected)[1] == {}


def test_class_means_are_means_over_all_batches() -> None:
    """Class 2: (1 + 3 + 8) / 3 = 4; class 0: 5."""
    batches = [(torch.tensor([[1.0], [5], [3]]), torch.tensor([2, 0, 2])), (torch.tensor([[8.0]]), torch.tensor([2]))]
    counts, rows = class_means(batches, 4)
    assert counts.tolist() == [1, 0, 3, 0] and rows.tolist() == [[5], [4]]


def test_fd_s_distance() -> None:
    """p = (1/2, 1/2), softmax (3/4, 1/4): KL = (ln(2/3) + ln 2) / 2 = ln(4/3) / 2; half the batch has no row."""
    z = torch.tensor([[math.log(3), 0.0], [5.0, 1.0]])
    p, known = torch.tensor([[0.5, 0.5], [0.0, 0.0]]), torch.tensor([True, False])
    assert float(FD().distance(z, p, known)) == pytest.approx(math.log(4 / 3) / 2 / 2)


def test_fml_s_loss() -> None:
    """p = (3/4, 1/4), s = (1/2, 1/2), y = 0: CE ln(4/3) and ln 2; KL(s || p) = ln(4/3) / 2,

    KL(p || s) = 3/4 ln(3/2) + 1/4 ln(1/2). With a = .8 and b = .6.
    """
    z = (torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]]))
    s_p, p_s = math.log(4 / 3) / 2, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    wanted = 0.8 * math.log(4 / 3) + 0.2 * s_p + 0.6 * math.log(2) + 0.4 * p_s
    assert float(FML(a=0.8, b=0.6).loss(z, torch.tensor([0]))) == pytest.approx(wanted)


@pytest.mark.parametrize(("energy", "rank"), [(0.0, 1), (0.6, 1), (0.7, 2), (0.95, 3)])
def test_fedkd_keeps_the_energy(energy: float, rank: int) -> None:
    """Singular values 2, 1, 1: 4, 5 and 6 sixths of the energy. 9 x 3: rank q costs 12 q of 27 numbers."""
    W = torch.zeros(9, 3)
    W[0, 0], W[1, 1], W[2, 2] = 2.0, 1.0, 1.0
    cut = compressed({"w": W, "b": torch.ones(9)}, energy)
    assert cut["b"].equal(torch.ones(9))
    assert cut["w"].rank == rank if rank < 3 else cut["w"] is W
    apart = decompressed(cut, {"w": W, "b": W[:, 0]})["w"] - W
    assert float(apart.norm() ** 2) == pytest.approx(3 - rank, abs=1e-5)


def test_fedkd_s_energy_rises_and_convolutions_come_back_in_shape() -> None:
    rule = FedKD()
    assert [rule.kept(Round(t, 0, rounds=3)) for t in (1, 2, 3)] == pytest.approx([0.95, 0.965, 0.98])
    B, A = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((16, 2), (2, 72)))
    W = (B @ A).reshape(16, 8, 3, 3)
    cut = compressed({"w": W}, 1 - 1e-6)
    assert isinstance(cut["w"], LowRank) and cut["w"].rank == 2
    torch.testing.assert_close(decompressed(cut, {"w": W})["w"], W, rtol=1e-4, atol=1e-4)


# --- what travels


def test_payloads_of_yi_s_networks() -> None:
    """LG-FedAvg 500 C + C; FedLoRA 511 h + 10 between networks that differ, 2011 h + 10 between CNN-1s (C = 10)."""
    client, rnd = Client("a", 1), Round(1, 0)
    for rule, name, wanted in (
        (LGFedAvg(), "yi5", 5_010),
        (FedLoRA(hidden=20), "yi5", 511 * 20 + 10),
        (FedLoRA(hidden=80), "yi2", 511 * 80 + 10),
        (FedLoRA(hidden=100, adapter="direct"), "yi1", 2011 * 100 + 10),
        (FML(), "yi5", 670_058),
        (Standalone(), "yi1", 0),
    ):
        state = rule.init(model_of(name, plan=True), [client])
        assert sizes(rule.download(state, client, rnd)) == wanted, rule


@pytest.mark.parametrize(("rule", "length"), [(FD(), 10), (FedProto(), 64)], ids=["fd", "fedproto"])
def test_class_statistics_cost_a_row_a_class(rule: Algorithm, length: int) -> None:
    """Up: the classes that the client has; down: those that anybody had before."""
    states, _, _, replies = played(rule, [[0, 1], [2, 3]])
    labels = EXAMPLES["train"].y
    assert labels is not None
    first = set(labels[ENDS[0] : ENDS[2]].tolist())
    for reply in replies:
        i = int(reply.client.id[1:])
        has = set(labels[ENDS[i] : ENDS[i + 1]].tolist())
        assert sizes(reply.returned) == length * len(has) + 10
        assert sizes(reply.sent) == length * len(first) + 10
    assert states[-1]["known"].nonzero().flatten().tolist() == sorted(first | set(labels[ENDS[2] : ENDS[4]].tolist()))


def test_a_direct_adapter_needs_two_linear_layers() -> None:
    with pytest.raises(FedError, match="yi1"):
        FedLoRA(adapter="direct").init(model_of("cnn5"), CLIENTS)


# --- through the recipe


def test_client_k_has_network_k_mod_5() -> None:
    asked = ["recipe=fedlora_cifar10", "data.name=prototypes", "data.side=32", "data.train_rows=300", "run.plan=true"]
    loaded = recipe.load([*asked, "clients.count=12"])
    federation = build_federation(loaded)
    assert [client.level for client in federation.clients] == [f"yi{i % 5 + 1}" for i in range(12)]
    plan = federation.plan()
    assert {level["name"]: level["params"] for level in plan["levels"]} == {
        "yi1": 2_621_558, "yi2": 1_815_142, "yi3": 1_320_558, "yi4": 1_060_358, "yi5": 670_058
    }  # fmt: skip
    assert {(level["down_params"], level["up_params"]) for level in plan["levels"]} == {(40_890, 40_890)}


def test_a_plan_counts_the_rows_of_each_client_s_own_classes() -> None:
    """FD's upload: for each of the client's classes 10 answers of 4 bytes, and 10 marks of a byte."""
    asked = ["recipe=vision_smoke", "algorithm.name=fd", "run.plan=true", "data.partition.eta=0.1"]
    loaded = recipe.load(asked)
    federation = build_federation(loaded)
    labels = federation.labels
    classes = {c.id: len({labels[i] for i in federation.parts[c.id]}) for c in federation.clients}
    assert len(set(classes.values())) > 1
    bytes_up = {client["id"]: client["bytes_up"] for client in federation.plan()["clients"]}
    for id, count in classes.items():
        rows = torch.zeros(count, 10)
        assert bytes_up[id] == ledger.size({"seen": torch.zeros(10, dtype=torch.bool), "rows": rows})


@pytest.mark.parametrize(("name", "at_most"), [("fedkd", True), ("fml", False)])
def test_a_plan_says_where_its_bytes_are_an_upper_bound(
    name: str, at_most: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", "recipe=vision_smoke", f"algorithm.name={name}"]
    assert cli.main(asked) == 0
    assert ("are the most that can travel" in capsys.readouterr().out) == at_most


def test_networks_that_differ_are_not_averaged() -> None:
    loaded = recipe.load(["recipe=fedlora_cifar10", "data.name=prototypes", "data.side=32", "algorithm.name=fedavg"])
    with pytest.raises(FedError, match="lg_fedavg"):
        build_federation(loaded)


@pytest.mark.parametrize(
    "form",
    [
        [],
        ["model.name=yi5", "model.own=[]", "algorithm.adapter=direct", "algorithm.hidden=10"],
        ["algorithm.name=fedproto"],
        ["algorithm.name=fedkd"],
    ],
    ids=["networks that differ", "networks that are alike", "fedproto", "fedkd"],
)
def test_the_recipe_runs_and_resumes_to_the_bit(form: list[str], tmp_path: Path) -> None:
    """Two rounds at once, or one and then, from the checkpoint with its private networks, the other."""
    asked = [
        "recipe=fedlora_cifar10",
        "data.name=prototypes",
        "data.side=32",
        "data.train_rows=60",
        "data.test_rows=60",
    ]
    asked += ["clients.count=5", "worker.epochs=1", "run.threads=1", "eval.every=1", *form]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train.main([*asked, "run.rounds=2", f"run.output={straight}"]) == 0
    assert train.main([*asked, "run.rounds=1", f"run.output={resumed}"]) == 0
    assert train.main([*asked, "run.rounds=2", f"run.output={resumed}", "run.resume=true"]) == 0
    lines = [(folder / "rounds.jsonl").read_text().splitlines() for folder in (straight, resumed)]
    last, again = (json.loads(text[-1]) for text in lines)
    assert {id: c["digest"] for id, c in last["clients"].items()} == {
        id: c["digest"] for id, c in again["clients"].items()
    }
    assert last["eval"] == again["eval"] and 0 <= last["eval"]["own_accuracy"] <= 1
    assert not last["refused"] and len(last["clients"]) == 5


@EVERY
def test_every_guard_works_or_is_refused_before_anybody_trains(rule: Algorithm) -> None:
    states, _, _, replies = played(rule, [[0, 1, 2, 3]])
    model, members = bench()[0].model, [reply.client for reply in replies]
    for guard in (Clip(0.5), Krum(), Median(), TrimmedMean(0.25)):
        try:
            guard.check(rule, model, members, len(members))
        except FedError as refusal:
            assert guard.entrywise and rule.own_entries in str(refusal)
            continue
        assert not (guard.entrywise and rule.own_entries)
        kept, _ = guard.guard(rule, replies)
        assert kept and not admit(kept, rule.expected)[1]
        after = ledger.flatten(rule.aggregate(states[0], kept, Round(1, seed=3, rounds=3)))
        assert all(bool(torch.isfinite(W).all()) for W in after.values() if W.is_floating_point())


def test_constants_that_fedkd_has_not_are_no_keys_of_its_recipe() -> None:
    for key in ("a", "b"):
        with pytest.raises(FedError, match=f"algorithm.{key}"):
            recipe.load(["recipe=vision_smoke", "algorithm.name=fedkd", f"algorithm.{key}=0.3"])
