"""Laws of the rules on whole networks, and the equalities between them, on networks of a few thousand weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fedllm.algorithms import WHOLE
from fedllm.algorithms.lora.fedloru import FedLoRAAvg, FedLoRU
from fedllm.algorithms.lora.mfedloru import MFedLoRU
from fedllm.algorithms.lora.pfedloru import PFedLoRU
from fedllm.algorithms.networks.depthfl import DepthFL
from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.algorithms.networks.fedhm import FedHM
from fedllm.algorithms.networks.fedlmt import FedLMT
from fedllm.algorithms.networks.fedrep import FedRep
from fedllm.algorithms.networks.flanc import FLANC
from fedllm.algorithms.networks.pfedlmt import PFedLMT
from fedllm.algorithms.networks.pfedlora import PFedLoRA1, PFedLoRA2
from fedllm.algorithms.networks.progfed import ProgFed
from fedllm.algorithms.networks.submodels import FedDropout, FedRolex, HeteroFL, SubModel
from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors, within
from fedllm.errors import FedError
from fedllm.federation.arrays import LEVELS
from fedllm.lowrank import LowRank
from fedllm.models.build import drawn
from fedllm.models.factorized import DECAYS, product, recover_weights
from fedllm.models.lowrank_conv import freeze, pairs_of
from fedllm.models.network import Network, fitted
from fedllm.models.submodel import index, read, take
from fedllm.server.admission import admit
from fedllm.server.robust import Clip, Krum, Median, TrimmedMean
from fedllm.tasks.images import Prototypes
from fedllm.wire import serialization as ledger
from fedllm.workers.settings import Vision
from fedllm.workers.vision import VisionWorker

TASK = Prototypes(sigma=0.7, train_rows=64, test_rows=40, side=8)
NETWORK = Network(widths=(8, 8, 8, 8))
ROUNDS = 8

RULES: dict[str, Algorithm] = {
    **{name: rule() for name, rule in WHOLE.items()},
    "fedavg, uniform": FedAvg(weighting="uniform"),
    "fedlmt, spectral, decay": FedLMT(start="spectral", decay={"frobenius": 1e-3}),
    "fedhm, v2": FedHM(alpha=0.5, svd_every=3),
    "heterofl, its own preset": HeteroFL(preset="heterofl_paper"),
    "feddropout, legacy": FedDropout(residuals="legacy"),
    "pfedlmt, simultaneous": PFedLMT(mode="simultaneous"),
    "fedrep, a block": FedRep(split=9),
    "fedlora_avg": FedLoRAAvg(),
    "fedloru": FedLoRU(tau=1),
    "pfedloru": PFedLoRU(tau=1),
    "mfedloru": MFedLoRU(tau=1),
}
"""The whole table, every option that changes what travels or is averaged, and what learns low-rank updates."""

EVERY = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
MIXED = [
    Client(f"c{i}", 0, width=LEVELS[level][0], depth=LEVELS[level][1], level=level)
    for i, level in enumerate(["b4", "b3", "b2", "b4"])
]
FULL = [dataclasses.replace(client, width=1.0, depth=4, level="b3") for client in MIXED]
"""Clients that are alike and hold whole networks (a level that FedLMT has a constant for)."""

EXAMPLES = {split: TASK.load(None, split, None, 0) for split in ("train", "test")}


def rounds(n: int = ROUNDS) -> list[Round]:
    return [Round(t, seed=3, rounds=ROUNDS) for t in range(1, n + 1)]


def bench(
    rule: Algorithm,
    clients: Sequence[Client] = MIXED,
    weights: Tensors | None = None,
    w0: Literal["zero", "keep"] = "zero",
    **settings: Any,
) -> tuple[VisionWorker, list[Client]]:
    """A worker for these clients with unequal shares of a few generated images, and the clients with their counts."""
    make = NETWORK.maker(rule.network, TASK.classes)
    draw = lambda net: drawn(net, Round(0, 3).rng("initial"))  # noqa: E731
    model = Model({**draw(make()), **(weights or {})}, anatomy=make().anatomy(), make=make, draw=draw)
    if rule.low_rank:
        model = freeze(model, w0, 16.0, Round(0, 3))
        of = {"b4": 4, "b3": 2, "b2": 1} if isinstance(rule, MFedLoRU) else dict.fromkeys(LEVELS, 2)
        clients = [Client(client.id, 0, rank=client.rank or of[client.level]) for client in clients]
    ends = [0, 10, 26, 42, 64]
    parts = {client.id: range(a, b) for client, a, b in zip(clients, ends, ends[1:], strict=False)}
    test_parts = {client.id: range(10 * i, 10 * i + 10) for i, client in enumerate(clients)}
    worker = VisionWorker(
        Vision(**{"batch_size": 8, "learning_rate": 0.05, **settings}),
        TASK,
        model,
        EXAMPLES["train"],
        EXAMPLES["test"],
        {id: list(part) for id, part in parts.items()},
        {id: list(part) for id, part in test_parts.items()},
        ROUNDS,
        torch.device("cpu"),
    )
    return worker, [dataclasses.replace(client, num_samples=len(parts[client.id])) for client in clients]


def played(
    rule: Algorithm,
    clients: Sequence[Client] = MIXED,
    n: int = 2,
    weights: Tensors | None = None,
    cohorts: Sequence[Sequence[int]] | None = None,
    **settings: Any,
) -> tuple[Tensors, dict[str, Tensors], list[Reply]]:
    """State, memories and last replies after ``n`` rounds of training."""
    worker, clients = bench(rule, clients, weights, **settings)
    rule.validate(clients)
    state: Tensors = ledger.canonical(rule.init(worker.model, clients))
    memories: dict[str, Tensors] = {}
    replies: list[Reply] = []
    for rnd in rounds(n):
        replies = []
        for client in clients if cohorts is None else [clients[i] for i in cohorts[rnd.index - 1]]:
            sent = ledger.canonical(rule.download(state, client, rnd))
            returned, memory, metrics = rule.local(worker.of(client), sent, memories.get(client.id, {}), rnd)
            memories[client.id] = ledger.canonical(memory)
            replies.append(Reply(client, sent, ledger.canonical(returned), metrics))
        kept, refused = admit(replies, rule.expected)
        assert not refused
        state = ledger.canonical(rule.aggregate(state, kept, rnd))
    return state, memories, replies


def echoed(rule: Algorithm, state: Tensors, clients: Sequence[Client], rnd: Round, change: float = 0.0) -> list[Reply]:
    """Replies of clients that add the same number to everything they were sent to be trained."""
    replies = []
    for client in clients:
        sent = rule.download(state, client, rnd)
        start = rule.expected(Reply(client, sent, {}))
        replies.append(Reply(client, sent, {name: moved(value, change) for name, value in start.items()}))
    return replies


def moved(value: Tensor | LowRank, change: float) -> Tensor | LowRank:
    if isinstance(value, LowRank):
        return LowRank(value.B + change, value.A + change)
    return value + change if value.is_floating_point() else value


def start(rule: Algorithm, clients: Sequence[Client] = MIXED) -> tuple[Tensors, list[Client]]:
    worker, clients = bench(rule, clients)
    return ledger.canonical(rule.init(worker.model, clients)), clients


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in ledger.flatten(tensors).items()}


def dense(tensors: Tensors) -> dict[str, Tensor]:
    return {name: value.dense() if isinstance(value, LowRank) else value for name, value in tensors.items()}


def close(given: Tensors, wanted: Tensors, tolerance: float = 1e-6) -> None:
    given, wanted = dense(given), dense(wanted)
    assert given.keys() == wanted.keys()
    for name, W in wanted.items():
        torch.testing.assert_close(
            given[name], W, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


# --- laws over the whole table


@EVERY
def test_clients_that_return_what_they_were_sent_move_nothing(rule: Algorithm) -> None:
    """But for FedHM, which truncates: what it serves is then what its clients hold, not the network it started from."""
    state, clients = start(rule, FULL)
    rnd = rounds(1)[0]
    after = rule.aggregate(state, echoed(rule, state, clients, rnd), rnd)
    if isinstance(rule, FedHM):
        truncated = recover_weights(rule.download(state, clients[0], rnd))
        close(rule.served(after), truncated, 1e-5)
    else:
        close(rule.served(after), rule.served(state))


@EVERY
def test_identical_clients_average_to_themselves(rule: Algorithm) -> None:
    state, clients = start(rule, FULL)
    rnd = rounds(1)[0]
    replies = echoed(rule, state, clients, rnd, change=0.25)
    alone = rule.served(rule.aggregate(state, replies[:1], rnd))
    if not isinstance(rule, FedDropout):  # each client's channels are its own
        close(rule.served(rule.aggregate(state, replies, rnd)), alone, 1e-5)


@EVERY
def test_the_order_of_clients_changes_nothing(rule: Algorithm) -> None:
    state = played(rule, n=1)[0]
    rnd = rounds(2)[1]
    worker, clients = bench(rule)
    replies = [
        Reply(c, sent, rule.local(worker.of(c), sent, {}, rnd)[0])
        for c, sent in ((c, rule.download(state, c, rnd)) for c in clients)
    ]
    wanted = rule.served(rule.aggregate(state, replies, rnd))
    close(rule.served(rule.aggregate(state, replies[::-1], rnd)), wanted, 1e-5)


@EVERY
def test_hooks_change_nothing_they_were_given_nor_the_global_generator(rule: Algorithm) -> None:
    worker, clients = bench(rule)
    state = ledger.canonical(rule.init(worker.model, clients))
    rnd, generator = rounds(1)[0], torch.get_rng_state()
    given, initial = bits(state), bits(worker.model.weights)
    sent = [ledger.canonical(rule.download(state, client, rnd)) for client in clients]
    sent_bits = [bits(payload) for payload in sent]
    first = [rule.local(worker.of(c), payload, {}, rnd) for c, payload in zip(clients, sent, strict=True)]
    memories = [ledger.canonical(memory) for _, memory, _ in first]
    memory_bits = [bits(memory) for memory in memories]
    replies = []
    for client, payload, memory in zip(clients, sent, memories, strict=True):
        returned, _, metrics = rule.local(worker.of(client), payload, memory, rnd)
        replies.append(Reply(client, payload, returned, metrics))
    returned_bits = [bits(reply.returned) for reply in replies]
    after = rule.aggregate(state, replies, rnd)
    rule.served(after)
    assert sum(rule.shares(state, replies).values()) == pytest.approx(1)
    for reply, memory in zip(replies, memories, strict=True):
        rule.personal(reply, memory)
    assert (bits(state), bits(worker.model.weights)) == (given, initial)
    assert [bits(payload) for payload in sent] == sent_bits
    assert [bits(memory) for memory in memories] == memory_bits
    assert [bits(reply.returned) for reply in replies] == returned_bits
    assert torch.equal(torch.get_rng_state(), generator)


@EVERY
def test_a_run_is_the_same_twice_and_from_a_saved_state(rule: Algorithm) -> None:
    """Bit for bit, whoever else trained on the worker before; from the values alone after round 1."""
    straight, memories, _ = played(rule, n=2)
    state, kept, _ = played(rule, n=1)
    worker, clients = bench(rule)
    rnd = rounds(2)[1]
    replies, after = [], dict(kept)
    for client in clients:
        sent = ledger.canonical(rule.download(state, client, rnd))
        returned, memory, metrics = rule.local(worker.of(client), sent, kept.get(client.id, {}), rnd)
        after[client.id] = ledger.canonical(memory)
        replies.append(Reply(client, sent, ledger.canonical(returned), metrics))
    assert bits(ledger.canonical(rule.aggregate(state, replies, rnd))) == bits(straight)
    assert {id: bits(memory) for id, memory in after.items()} == {id: bits(memory) for id, memory in memories.items()}


@EVERY
def test_the_state_stops_growing(rule: Algorithm) -> None:
    """Two rounds before the end it is as large as ever: FedLoRU's W, 8 x 72, is dense after four updates of rank 2."""
    state, clients = start(rule)
    sizes = []
    for rnd in rounds():
        state = rule.aggregate(state, echoed(rule, state, clients, rnd, change=0.01), rnd)
        sizes.append(ledger.size(state))
    assert sizes[-1] <= max(sizes[:-2])
    assert isinstance(rule, FedLoRU) or sizes[-1] <= ledger.size(start(rule)[0])


@EVERY
def test_what_a_client_returns_is_admitted_and_what_it_breaks_is_not(rule: Algorithm) -> None:
    _, _, replies = played(rule, n=1)
    name, value = next(iter(replies[0].returned.items()))
    broken = {**replies[0].returned, name: moved(value, float("nan"))}
    kept, refused = admit([dataclasses.replace(replies[0], returned=broken), *replies[1:]], rule.expected)
    assert len(kept) == 3 and "NaN" in refused["c0"]


@EVERY
def test_what_is_served_is_a_network_or_its_shared_part(rule: Algorithm) -> None:
    state, memories, replies = played(rule, n=1)
    worker, _ = bench(rule)
    metrics = worker.evaluate(rule.served(state)).metrics
    whole = not isinstance(rule, FedRep | PFedLMT)
    assert ("accuracy" in metrics) == whole
    own = worker.evaluate(rule.personal(replies[0], memories["c0"])).metrics
    assert 0 <= own["accuracy"] <= 1
    if any(name != "held" and not name.startswith("W/") for name in memories["c0"]):  # it keeps what nobody else has
        assert 0 <= replies[0].metrics["own_accuracy"] <= 1


# --- equalities of the specification


def test_fedlmt_with_nothing_factorised_is_fedavg() -> None:
    lmt = played(FedLMT(rho=17, alpha=0.5))[0]
    assert bits(lmt) == bits(played(FedAvg())[0])


def test_heterofl_fedrolex_and_feddropout_with_full_clients_are_fedavg() -> None:
    wanted = played(FedAvg(weighting="uniform"), FULL)[0]
    for rule in (HeteroFL(), FedDropout()):
        close(rule.served(played(rule, FULL)[0]), wanted, 1e-5)
    rolex = FedRolex()
    close(rolex.served(played(rolex, FULL, n=1)[0]), played(FedAvg(weighting="uniform"), FULL, n=1)[0], 1e-5)


def test_a_rolled_full_client_computes_the_same_function() -> None:
    """FedRolex's later windows permute the channels of full clients consistently: sums in another order, no more."""
    rolex = FedRolex()
    state, clients = start(rolex, FULL)
    worker, _ = bench(rolex, FULL)
    x = EXAMPLES["test"].x
    net = fitted(worker.model.make(), rolex.download(state, clients[0], Round(3, 3, rounds=ROUNDS)))  # type: ignore[misc]
    plain = fitted(worker.model.make(), rolex.served(state))  # type: ignore[misc]
    torch.testing.assert_close(net.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_feddropout_s_published_variant_is_not_even_fedavg_with_full_clients() -> None:
    legacy = FedDropout(residuals="legacy")
    state, clients = start(legacy, FULL)
    worker, _ = bench(legacy, FULL)
    x = EXAMPLES["test"].x
    net = fitted(worker.model.make(), legacy.download(state, clients[0], Round(1, 3, rounds=ROUNDS)))  # type: ignore[misc]
    plain = fitted(worker.model.make(), legacy.served(state))  # type: ignore[misc]
    assert float((net.eval()(x) - plain.eval()(x)).detach().abs().max()) > 0.01


def test_channels_that_no_heterofl_client_holds_keep_their_first_values() -> None:
    half = [dataclasses.replace(client, width=0.5, level="b2") for client in MIXED]
    rule = HeteroFL()
    state = played(rule, half)[0]
    before = start(rule, half)[0]
    anatomy = read(state["anatomy"])
    held = index(anatomy, rule.channels(anatomy, half[0], rounds(1)[0]))
    for name, W in rule.served(state).items():
        old = rule.served(before)[name]
        inside = torch.zeros(W.shape, dtype=torch.bool)
        mesh = [
            torch.arange(n) if a is None else a for n, a in zip(W.shape, held.get(name, (None,) * W.ndim), strict=True)
        ]
        inside[torch.meshgrid(*mesh, indexing="ij")] = True
        assert torch.equal(W[~inside], old[~inside])
        assert not torch.equal(W[inside], old[inside]), name


def test_fedrolex_reaches_every_channel() -> None:
    half = [dataclasses.replace(client, width=0.5, level="b2") for client in MIXED]
    rule = FedRolex()
    state, before = played(rule, half, n=8)[0], start(rule, half)[0]
    widest = "stages.3.0.conv1.weight"
    moved = (rule.served(state)[widest] != rule.served(before)[widest]).flatten(1).any(1)
    assert bool(moved.all())


def test_fedhm_v2_between_its_ends() -> None:
    """Never an SVD: FedLMT from a spectral start; an SVD every round: FedHM; some: neither."""
    same: dict[str, Any] = {"rho": 3, "alpha": 0.6, "weighting": "data"}
    lmt = recover_weights(played(FedLMT(rho=3, alpha=0.6, start="spectral"), n=3)[0])
    runs = {every: FedHM(**same, svd_every=every) for every in (None, 1, 2)}
    served = {every: rule.served(played(rule, n=3)[0]) for every, rule in runs.items()}
    full = {name for name in served[None] if name not in lmt}
    assert not full
    first = played(runs[None], n=3)[0]
    close({**recover_weights(within("factors", first))}, lmt, 1e-5)
    by_level = FedHM(rho=3, alphas=dict.fromkeys(LEVELS, 0.6), weighting="data")
    close(by_level.served(played(by_level, n=3)[0]), served[1], 1e-6)
    assert any(not torch.allclose(served[2][name], served[1][name], atol=1e-5) for name in served[1])


def test_fedhm_sends_the_best_approximation_at_each_rank() -> None:
    """By an SVD of its own, in numpy's words: the error of what is sent is the tail of the singular values."""
    rule = FedHM(rho=1, alphas={"b4": 1.0, "b3": 0.75, "b2": 0.25, "b1": 0.1})
    state, clients = start(rule)
    W = rule.served(state)["stages.2.0.conv2.weight"]
    M = W.permute(0, 2, 1, 3).reshape(W.shape[0] * 3, -1).double()
    for client in clients:
        r = round(rule.ratio(client) * W.shape[0])
        sent = rule.download(state, client, rounds(1)[0])
        assert len(sent["stages.2.0.conv2.first.weight"]) == r
        error = float((recover_weights(sent)["stages.2.0.conv2.weight"] - W).double().norm())
        assert error == pytest.approx(float(torch.linalg.svdvals(M)[r:].norm()), rel=1e-4)


def test_depthfl_s_last_exit_alone_is_fedavg() -> None:
    rule = DepthFL(distillation=0.0, losses="last")
    worker, _ = bench(rule, FULL)
    plain = played(FedAvg(weighting="uniform"), FULL, weights={})[0]
    start_from = {name: W for name, W in bench(FedAvg(), FULL)[0].model.weights.items()}
    state = played(rule, FULL, weights=start_from)[0]
    served = rule.served(state)
    close({name: served[name] for name in plain}, plain, 1e-5)
    side = [name for name in served if name not in plain]
    assert side and all(torch.equal(served[name], worker.model.weights[name]) for name in side)


def test_depthfl_s_exits_teach_each_other() -> None:
    """Two exits by hand: the KL terms are of detached teachers, both ways, over b - 1 = 1."""
    rule, rnd = DepthFL(ramp=0.0), Round(1, 0, rounds=10)
    a, b, y = torch.tensor([[2.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 1.0]]), torch.tensor([0])
    p, q = torch.softmax(a.detach(), -1), torch.softmax(b, -1)
    ce = -p.log()[0, 0] - q.log()[0, 0]
    kl = (q * (q / p).log()).sum() + (p * (p / q).log()).sum()
    loss = rule.loss((a, b), y, rnd)
    torch.testing.assert_close(loss.detach(), ce + kl)
    loss.backward()
    expected = (p - torch.tensor([1.0, 0.0])) + (p - q)  # of the cross-entropy, and of KL(q || softmax(a))
    torch.testing.assert_close(a.grad, expected)
    assert [round(DepthFL().weight(Round(t, 0, rounds=100)), 4) for t in (15, 30, 60)] == [0.2865, 1.0, 1.0]


def test_progfed_in_one_stage_is_fedavg() -> None:
    rule = ProgFed(stages=1)
    weights = dict(bench(FedAvg())[0].model.weights)
    close(rule.served(played(rule, weights=weights)[0]), played(FedAvg())[0], 1e-6)


def test_progfed_grows_as_its_schedule_says() -> None:
    """8 rounds in 4 stages: 1, 1, 1 and the remaining 5."""
    rule = ProgFed()
    assert rule.phases(ROUNDS) == (1, 1, 1, 5)
    state, clients = start(rule)
    heads = []
    for rnd in rounds():
        sent = rule.download(state, clients[0], rnd)
        heads.append({name.split(".")[1] for name in sent if name.startswith("heads.")})
        assert len({name.split(".")[1] for name in sent if name.startswith("stages.")}) == int(max(heads[-1]))
    assert heads == [{"1"}, {"2"}, {"3"}, *[{"4"}] * 5]


def test_flanc_shares_its_bases_and_nothing_else_across_widths() -> None:
    rule = FLANC()
    state, clients = start(rule)
    rnd = rounds(1)[0]
    replies = echoed(rule, state, clients[:2], rnd, change=1.0)  # b4 and b3; no client of b2 is in the cohort
    after = rule.aggregate(state, replies, rnd)
    for name, W in state.items():
        moved = 0.0 if name.startswith("width/0.75/") else 1.0
        torch.testing.assert_close(after[name], W + moved)
    assert rule.served(after)["head.fc.weight"].shape[1] == round(1.75 * 8)


def test_pfedlmt_keeps_what_is_a_client_s_own() -> None:
    """A client that is not drawn keeps its q; p is one for all."""
    rule = PFedLMT()
    first = played(rule, n=1, cohorts=[[0, 1, 2, 3]])[1]
    state, second, _ = played(rule, n=2, cohorts=[[0, 1, 2, 3], [0, 1]])
    assert bits(second["c2"]) == bits(first["c2"]) and bits(second["c0"]) != bits(first["c0"])
    worker, clients = bench(rule)
    assert len({str(bits(rule.download(state, client, rounds(3)[2]))) for client in clients}) == 1
    ranks = {id: len(memory["stages.2.0.conv1.first.weight"]) for id, memory in second.items()}
    assert ranks == {"c0": 11, "c1": 5, "c2": 1, "c3": 11}  # round(alpha 8) for alpha 1.4, .6, .15


def test_alternating_phases_leave_the_other_group_bit_for_bit() -> None:
    """With all steps in one phase the other group does not move, momentum and decay included."""
    worker, clients = bench(FedAvg())
    sent = worker.model.weights
    head = {name for name in sent if name.startswith("heads.")}
    for chosen in (head, set(sent) - head):
        returned, _, _ = worker.of(clients[1]).train(sent, {}, rounds(1)[0], phases=((1.0, chosen.__contains__),))
        assert {name for name in sent if not torch.equal(sent[name], returned[name])} == chosen


def test_pfedlora_without_scale_is_fedavg() -> None:
    """alpha 0: the private pairs add nothing, and get no gradient but their own decay."""
    close(played(PFedLoRA2(alpha=0.0, rank=2), n=1)[0], played(FedAvg(), n=1)[0], 1e-4)


def test_pfedlora_s_personal_model_has_the_pair_in_its_weights() -> None:
    rule = PFedLoRA1(rank=2)
    state, memories, replies = played(rule)
    own = rule.personal(replies[0], memories["c0"])
    assert own.keys() == replies[0].returned.keys()
    layer, product = next(iter(pairs_of(memories["c0"], "private").items()))
    W = replies[0].returned[f"{layer}.weight"]
    torch.testing.assert_close(own[f"{layer}.weight"], W + 16.0 / product.rank * product.dense().view_as(W))
    worker, clients = bench(rule)
    ours = worker.measure(own, torch.arange(10))
    assert ours["accuracy"] == pytest.approx(replies[0].metrics["own_accuracy"])
    assert ours["loss"] == pytest.approx(replies[0].metrics["own_loss"], rel=1e-4)


def test_heterofl_s_mask_keeps_rows_of_classes_that_a_client_lacks() -> None:
    """Clients of one class each: in the head only the rows of these classes move, each as its own client moved it."""
    rule = HeteroFL(preset="heterofl_paper")
    worker, clients = bench(rule, FULL)
    for i, client in enumerate(clients):
        worker.parts[client.id] = (worker.train_set.y == i).nonzero().flatten()  # type: ignore[union-attr]
    state = rule.init(worker.model, clients)
    rnd = rounds(1)[0]
    replies = []
    for client in clients:
        sent = rule.download(state, client, rnd)
        replies.append(Reply(client, sent, rule.local(worker.of(client), sent, {}, rnd)[0]))
    after = rule.served(rule.aggregate(state, replies, rnd))
    head, before = "heads.4.fc.weight", rule.served(state)["heads.4.fc.weight"]
    assert torch.equal(after[head][4:], before[4:])
    for i, reply in enumerate(replies):
        assert torch.equal(after[head][i], reply.returned[head][i]) and not torch.equal(after[head][i], before[i])


@pytest.mark.parametrize("name", DECAYS)
def test_a_decay_shrinks_its_own_term(name: str) -> None:
    """Below what it was at the start, and below what it is after the same rounds without."""

    def term(weights: Tensors) -> float:
        firsts = [key for key in weights if key.endswith(".first.weight")]
        pairs = [(weights[key], weights[key.replace(".first.", ".second.")]) for key in firsts]
        return sum(float(DECAYS[name](product(*pair))) for pair in pairs)

    free, decayed = (FedLMT(rho=1, alpha=0.5, decay=decay) for decay in ({}, {name: 0.05}))
    before, without, after = (term(played(rule, n=n)[0]) for rule, n in ((free, 0), (free, 3), (decayed, 3)))
    assert after < min(before, without)


@pytest.mark.parametrize(
    ("rule", "clients", "message"),
    [
        (FedLMT(), [Client("strong", 1, level="b4")], "rho and algorithm.alpha"),
        (FedHM(svd_every=2), MIXED, "one rank for all"),
    ],
)
def test_clients_that_cannot_take_part_are_told(rule: Algorithm, clients: list[Client], message: str) -> None:
    with pytest.raises(FedError, match=message):
        rule.validate(clients)


def test_a_mixed_federation_trains_the_weakest_client_s_network() -> None:
    levels = lambda *names: [Client(name, 1, level=name) for name in names]  # noqa: E731
    assert FedLMT().capacity(levels("b4", "b3", "b2")) == (3, 0.15)
    assert FedLMT().capacity(levels("b4", "b1")) == (1, 0.03)
    assert FedLMT(alpha=0.2).capacity(levels("b3")) == (5, 0.2)


@pytest.mark.parametrize("rule", [HeteroFL(), FedRolex(), FedDropout(), FedDropout(residuals="legacy")], ids=str)
def test_a_sub_model_is_its_slice_of_the_server_s(rule: SubModel) -> None:
    state, clients = start(rule)
    rnd = rounds(4)[3]
    anatomy = read(state["anatomy"])
    for client in clients:
        wanted = take(rule.served(state), index(anatomy, rule.channels(anatomy, client, rnd)))
        assert bits(rule.download(state, client, rnd)) == bits(wanted)
        assert wanted["stages.3.1.conv1.weight"].shape[0] == round(client.width * 8)


GUARDS = [Clip(0.5), Krum(), Median(), TrimmedMean(0.25)]


@EVERY
def test_every_guard_works_or_is_refused_before_anybody_trains(rule: Algorithm) -> None:
    """What a guard lets through after a round of training is admissible, and the aggregate of it finite."""
    clients = MIXED if comparable(rule, MIXED) else FULL
    _, _, replies = played(rule, clients, n=1)
    members = [reply.client for reply in replies]
    model = bench(rule, clients)[0].model
    start, rnd = ledger.canonical(rule.init(model, members)), rounds(1)[0]
    for guard in GUARDS:
        try:
            guard.check(rule, model, members, len(members))
        except FedError as refusal:
            assert guard.entrywise and "compares updates entry by entry" in str(refusal)
            continue
        kept, _ = guard.guard(rule, replies)
        assert kept and not admit(kept, rule.expected)[1]
        after = ledger.flatten(rule.served(rule.aggregate(start, kept, rnd)))
        assert all(bool(torch.isfinite(W).all()) for W in after.values() if W.is_floating_point())


def comparable(rule: Algorithm, clients: Sequence[Client]) -> bool:
    worker, members = bench(rule, clients)
    try:
        Median().check(rule, worker.model, members, len(members))
    except FedError:
        return False
    return True


def test_which_rules_have_common_entries() -> None:
    """Clients that are alike can be compared by all rules but those that draw channels a client; mixed by fewer."""
    drawn = {"feddropout", "feddropout, legacy"}
    assert {name for name, rule in RULES.items() if not comparable(rule, FULL)} == drawn
    apart = {"heterofl", "heterofl, its own preset", "fedrolex", "depthfl", "flanc", "fedhm"}
    assert {name for name, rule in RULES.items() if not comparable(rule, MIXED)} == drawn | apart


def test_a_cohort_too_small_for_krum_is_refused_before_anybody_trains() -> None:
    worker, members = bench(FedAvg())
    with pytest.raises(FedError, match="robust.name=krum: 7 replies or more are needed, and a round has 4 clients"):
        Krum(liars=2).check(FedAvg(), worker.model, members, len(members))


@pytest.mark.parametrize("name", ["pfedlmt", "fedhm", "fedlmt"])
def test_rho_beyond_the_network_is_refused_at_the_start(name: str) -> None:
    rule = WHOLE[name](**{"rho": 19, "alpha": 0.5})
    model = bench(rule)[0].model
    with pytest.raises(FedError, match="0 to 18 for this model, got 19"):
        rule.init(model, FULL)


def test_a_split_beyond_the_network_is_refused_at_the_start() -> None:
    with pytest.raises(FedError, match="0 to 17 for this model, got 18"):
        FedRep(split=18).init(bench(FedRep())[0].model, FULL)
