"""Telemetry: by hand and against dense algebra, why each rule loses, what it costs; and whom the server holds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedllm.algorithms import LOW_RANK
from fedllm.algorithms.lora.fedhl import FedHL
from fedllm.algorithms.lora.fedit import FedIT
from fedllm.algorithms.lora.fedloru import FedLoRU
from fedllm.algorithms.lora.flexlora import FlexLoRA
from fedllm.algorithms.lora.flora import FLoRA
from fedllm.algorithms.lora.hetlora import HetLoRA
from fedllm.algorithms.lora.zero_padding import ZeroPadding
from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.privacy.cohorts import uniform as sample
from fedllm.server import telemetry
from fedllm.server.telemetry import measure
from fedllm.wire.serialization import canonical

SHAPES = {"q": (40, 30), "v": (24, 30)}
MIXED = [Client("a", 30, 2), Client("b", 10, 3), Client("c", 25, 5), Client("d", 35, 8)]
EQUAL = [Client(client.id, client.num_samples, 4) for client in MIXED]


def model(shapes: dict[str, tuple[int, int]], update: Tensors | None = None) -> Model:
    return Model({name: torch.empty(*shape, device="meta") for name, shape in shapes.items()}, update or {})


def clients_of(rule: Algorithm) -> list[Client]:
    try:
        rule.validate(MIXED)
    except FedError:
        return EQUAL
    return MIXED


def stepped(start: LowRank | Tensor, *key: object) -> LowRank | Tensor:
    """Trained a little: every number moves by 0.2 of a normal one."""
    rng = Round(0, 7).rng(*key)
    if isinstance(start, Tensor):
        return start + 0.2 * torch.randn(start.shape, generator=rng)
    return LowRank(
        start.B + 0.2 * torch.randn(start.B.shape, generator=rng),
        start.A + 0.2 * torch.randn(start.A.shape, generator=rng),
    )


def dense(M: LowRank | Tensor) -> Any:
    return (M.B.double() @ M.A.double() if isinstance(M, LowRank) else M.double()).numpy()


def played(rule: Algorithm, rounds: int, shapes: dict[str, tuple[int, int]] = SHAPES) -> list[dict[str, Any]]:
    """Every round's telemetry, next to what dense float64 algebra says of the same round."""
    clients = clients_of(rule)
    state = canonical(rule.init(model(shapes), clients))
    found = []
    for index in range(1, rounds + 1):
        rnd = Round(index, seed=3)
        replies, ideal = [], {name: dense(W) for name, W in rule.served(state).items()}
        n = sum(client.num_samples for client in clients)
        steps: dict[str, dict[str, Any]] = {}
        for client in clients:
            sent = canonical(rule.download(state, client, rnd))
            starts = rule.expected(Reply(client, sent, {}))
            ends = {name: stepped(start, index, client.id, name) for name, start in starts.items()}
            reply = Reply(client, sent, canonical(ends))
            replies.append(reply)
            begun, done = rule.trained(Reply(client, sent, starts)), rule.trained(reply)
            steps[client.id] = {name: dense(done[name]) - dense(begun[name]) for name in shapes}
        p = rule.shares(state, replies)
        assert rule.__class__ in (FedHL, HetLoRA) or p == {c.id: c.num_samples / n for c in clients}
        mean = {name: sum(p[id] * step[name] for id, step in steps.items()) for name in shapes}
        after = canonical(rule.aggregate(state, replies, rnd))
        served = {name: dense(W) for name, W in rule.served(after).items()}
        target = {name: ideal[name] + mean[name] for name in shapes}
        drift = {id: _norm(step) for id, step in steps.items()}
        wanted = {
            "served_error": _norm({m: served[m] - target[m] for m in shapes}) / _norm(target),
            "drift": drift,
            "cosine": {
                id: sum(float((step[m] * mean[m]).sum()) for m in shapes) / drift[id] / _norm(mean)
                for id, step in steps.items()
            },
            "singular": {name: np.linalg.svd(W, compute_uv=False) for name, W in served.items()},
        }
        found.append({"given": measure(rule, state, after, replies), "wanted": wanted, "served": served})
        state = after
    return found


def _norm(matrices: dict[str, Any]) -> float:
    return math.sqrt(sum(float((matrix**2).sum()) for matrix in matrices.values()))


@pytest.mark.parametrize("name", [name for name in LOW_RANK if name != "fedsa_lora"])
def test_numbers_are_those_of_dense_algebra(name: str) -> None:
    """Small models have exact numbers: five rounds of every rule, to 1e-4."""
    for rnd in played(LOW_RANK[name](), 5):
        given, wanted = rnd["given"], rnd["wanted"]
        assert given["served_error"] == pytest.approx(wanted["served_error"], rel=1e-4, abs=2e-6)
        for key in ("drift", "cosine"):
            assert given[key] == pytest.approx(wanted[key], rel=1e-4)
        S = wanted["singular"]
        whole = sum((s**2).sum() for s in S.values())
        for r, cut in given["truncation"].items():
            expected = math.sqrt(sum((s[int(r) :] ** 2).sum() for s in S.values()) / whole)
            assert cut == pytest.approx(expected, rel=1e-3, abs=2e-6), r
        assert {"2", "3", "5", "8"} <= given["truncation"].keys() or {"4"} <= given["truncation"].keys()
        for j, value in given["singular_values"].items():
            expected = math.sqrt(np.mean([s[int(j) - 1] ** 2 for s in S.values()]))
            assert value == pytest.approx(expected, rel=1e-3, abs=1e-5), j
        stable = np.mean([(s**2).sum() / s[0] ** 2 for s in S.values()])
        assert given["rank"]["stable"] == pytest.approx(stable, rel=1e-3)
        assert json.loads(json.dumps(given, allow_nan=False)) == given


def test_a_rule_that_serves_the_base_model_has_numbers_too() -> None:
    """FedSA-LoRA: without a client's B its update cannot be told, so the server sees none."""
    rule = LOW_RANK["fedsa_lora"]()
    clients = clients_of(rule)
    state = rule.init(model(SHAPES), clients)
    replies = []
    for client in clients:
        sent = rule.download(state, client, Round(1, 3))
        starts = rule.expected(Reply(client, sent, {}))
        replies.append(
            Reply(client, sent, {name: stepped(start, 1, client.id, name) for name, start in starts.items()})
        )
    given = measure(rule, state, rule.aggregate(state, replies, Round(1, 3)), replies)
    assert json.loads(json.dumps(given, allow_nan=False)) == given and set(given["drift"].values()) == {0.0}


def test_effective_rank_by_hand() -> None:
    """Four equal singular values: exp(log 4) = 4, stable rank 4; values (2, 1): shares (4/5, 1/5), entropy 0.5004."""
    rule, client = FLoRA(), Client("a", 1, 4)
    for values, effective, stable in (((1.0,) * 4, 4.0, 4.0), ((2.0, 1.0), math.exp(0.500402), 5 / 4)):
        state = rule.init(model({"w": (6, 5)}), [client])
        sent = rule.download(state, client, Round(1, 0))
        B, A = torch.zeros(6, 4), torch.zeros(4, 5)
        for place, value in enumerate(values):
            B[place, place], A[place, place] = value, 1.0
        replies = [Reply(client, sent, {"w": LowRank(B, A)})]
        given = measure(rule, state, rule.aggregate(state, replies, Round(1, 0)), replies)
        assert given["rank"] == pytest.approx({"effective": effective, "stable": stable}, rel=1e-5)


def errors(rule: Algorithm, rounds: int = 8) -> list[float]:
    return [rnd["given"]["served_error"] for rnd in played(rule, rounds)]


def test_why_a_rule_loses() -> None:
    """The same steps, round after round: what each rule's average does to them.

    FedIT (equal ranks) has cross terms in every round; zero-padding dilutes from the first round on; FlexLoRA has
    nothing to lose in round 1 and loses what truncation cut off in every later one; FedHL and FLoRA never.
    """
    fedit, padding, flexlora, fedhl, flora = map(errors, (FedIT(), ZeroPadding(), FlexLoRA(), FedHL(), FLoRA()))
    assert min(fedit) > 0.05 and min(padding) > 0.05
    assert flexlora[0] < 1e-5 and min(flexlora[1:]) > 0.05
    assert max(fedhl) < 1e-5 and max(flora) < 1e-5
    assert min(padding) > 1e4 * max(fedhl)


def test_fedhl_has_as_much_to_truncate_as_flexlora_and_loses_none_of_it() -> None:
    """A client of rank 2 cannot hold over a tenth of either's W in the end: FlexLoRA alone serves less for it."""
    given = {rule: played(rule(), 8)[-1]["given"] for rule in (FlexLoRA, FedHL)}
    assert all(of["truncation"]["2"] > 0.1 for of in given.values())
    assert given[FlexLoRA]["served_error"] > 0.05 and given[FedHL]["served_error"] < 1e-5


def test_flexlora_s_bias_accumulates() -> None:
    """Against the sum of all steps, exact in float64: FlexLoRA's distance grows with the errors that telemetry adds up.

    The errors' norms bound it: distance_t <= sum of || W' - T ||; FedHL's distance stays at rounding.
    """
    for rule, biased in ((FlexLoRA(), True), (FedHL(weights="fedavg"), False)):
        state, total = canonical(rule.init(model(SHAPES), MIXED)), {name: np.zeros(s) for name, s in SHAPES.items()}
        distances, bound, bounds = [], 0.0, []
        for index in range(1, 9):
            rnd, replies = Round(index, seed=3), []
            before = {name: dense(W) for name, W in rule.served(state).items()}
            for client in MIXED:
                sent = canonical(rule.download(state, client, rnd))
                replies.append(Reply(client, sent, {n: stepped(M, index, client.id, n) for n, M in sent.items()}))
            p = rule.shares(state, replies)
            step = {n: sum(p[r.client.id] * (dense(r.returned[n]) - dense(r.sent[n])) for r in replies) for n in SHAPES}
            total = {n: total[n] + step[n] for n in SHAPES}
            after = canonical(rule.aggregate(state, replies, rnd))
            given = measure(rule, state, after, replies)["served_error"]
            bound += given * _norm({n: before[n] + step[n] for n in SHAPES})
            served = {n: dense(W) for n, W in rule.served(after).items()}
            distances.append(_norm({n: served[n] - total[n] for n in SHAPES}))
            bounds.append(bound)
            state = after
        if biased:
            assert distances[0] < 1e-5 and distances[1:] == sorted(distances[1:]) and distances[-1] > 2 * distances[1]
            assert all(d <= b * (1 + 1e-4) + 1e-5 for d, b in zip(distances, bounds, strict=True))
            assert distances[-1] > 0.3 * bounds[-1], "and the bound is no idle one"
        else:
            assert max(distances) < 1e-4 and bounds[-1] < 1e-4


def test_fedloru_has_cross_terms_and_no_other_error() -> None:
    """Clients that agree have no cross terms, accumulation or not: the same reply from everybody is served exactly."""
    rule = FedLoRU(tau=2)
    assert min(errors(rule)) > 0.05
    state = rule.init(model(SHAPES), EQUAL)
    for index in range(1, 6):
        rnd, replies = Round(index, 3), []
        for client in EQUAL:
            sent = rule.download(state, client, rnd)
            ends = {n: stepped(M, index, n) for n, M in rule.expected(Reply(client, sent, {})).items()}
            replies.append(Reply(client, sent, ends))
        after = rule.aggregate(state, replies, rnd)
        given = measure(rule, state, after, replies)
        assert given["served_error"] < 2e-6 and min(given["cosine"].values()) > 1 - 1e-5
        state = after


def test_wide_matrices_are_sketched() -> None:
    """12 modules of 300 x 400, 192 probes: a deviation of 5 % at most; zero stays zero; the same estimate again."""
    shapes = {f"m{i}": (300, 400) for i in range(12)}
    for rule in (FlexLoRA(), FedHL(), FedLoRU(tau=1)):
        rounds = played(rule, 2, shapes)
        for rnd in rounds:
            given, wanted = rnd["given"], rnd["wanted"]
            assert given["served_error"] == pytest.approx(wanted["served_error"], rel=0.15, abs=1e-5)
            assert given["drift"] == pytest.approx(wanted["drift"], rel=0.15)
            assert given["cosine"] == pytest.approx(wanted["cosine"], abs=0.1)
    assert rounds[-1]["given"] == played(rule, 2, shapes)[-1]["given"]


def test_an_estimated_spectrum_is_close_from_below() -> None:
    """A dense W with singular values 2^-j, of which the sketch's span holds nearly all."""
    rng = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 40, generator=rng)).Q for n in (300, 200))
    S = 0.5 ** torch.arange(40.0)
    W = (U * S) @ V.T
    for stored in (W, LowRank(torch.cat([U * S, torch.zeros(300, 100)], 1), torch.cat([V.T, torch.ones(100, 200)]))):
        found = telemetry.spectrum({}, "w", stored, {200: telemetry.probes(200)})
        torch.testing.assert_close(found.S[:8].float(), S[:8], rtol=1e-2, atol=0)
        assert bool((found.S[:8] <= S[:8].double() * (1 + 1e-5)).all())
        assert found.beyond(0) == pytest.approx(float(S.norm()), rel=0.2)


def test_what_is_no_matrix_is_left_out() -> None:
    """A rule on whole networks: a convolution's kernel and a norm's weights say nothing; a linear layer does."""

    class Mean(Algorithm):
        def aggregate(self, state: Tensors, replies: Any, rnd: Round) -> Tensors:
            return replies[0].returned

    rule, client = Mean(), Client("a", 3)
    state = {"conv": torch.zeros(4, 3, 3, 3), "norm": torch.zeros(4), "count": torch.tensor(3)}
    assert measure(rule, state, state, [Reply(client, state, state)]) == {}
    state |= {"linear": torch.eye(3)}
    moved = {**state, "linear": 2 * torch.eye(3)}
    given = measure(rule, state, moved, [Reply(client, state, moved)])
    assert given["drift"] == pytest.approx({"a": math.sqrt(3)}) and given["served_error"] == 0.0


def test_every_layer_of_a_network_has_its_smallest_singular_value() -> None:
    """U = (3, 4)^T has 5 and V^T = (0.6, 0.8) has 1; a 1 x 1 convolution diag(2, 0.5) has 0.5."""

    class Mean(Algorithm):
        def aggregate(self, state: Tensors, replies: Any, rnd: Round) -> Tensors:
            return replies[0].returned

    rule, client = Mean(), Client("a", 3)
    state = {
        "low.first.weight": torch.tensor([[0.6, 0.8]]),
        "low.second.weight": torch.tensor([[3.0], [4.0]]),
        "conv.weight": torch.diag(torch.tensor([2.0, 0.5]))[:, :, None, None],
    }
    found = measure(rule, state, state, [Reply(client, state, state)])
    assert found["smallest_singular_value"] == pytest.approx({"low": 1.0, "conv": 0.5}) and found["drift"] == {"a": 0.0}
    convolutions = {"conv.weight": state["conv.weight"]}
    alone = measure(rule, convolutions, convolutions, [Reply(client, convolutions, convolutions)])
    assert alone == {"smallest_singular_value": pytest.approx({"conv": 0.5})}


def test_nothing_learned_yet() -> None:
    """W = 0 and clients that return what they were sent: zeros, no division by them, and no spectrum."""
    for rule in (FedHL(), FedIT(), FedLoRU()):
        state = rule.init(model(SHAPES), EQUAL)
        sent = {client.id: rule.download(state, client, Round(1, 0)) for client in EQUAL}
        replies = [Reply(c, sent[c.id], dict(rule.expected(Reply(c, sent[c.id], {})))) for c in EQUAL]
        given = measure(rule, state, rule.aggregate(state, replies, Round(1, 0)), replies)
        zeros = dict.fromkeys([c.id for c in EQUAL], 0.0)
        assert given == {"served_error": 0.0, "drift": zeros, "cosine": zeros}


# --- what it costs, and what the server holds


SERVER = """
import resource, sys
import torch
torch.set_num_threads(1)
from fedllm.algorithms import LOW_RANK
from fedllm.core import Client, Model, Reply, Round
from fedllm.wire.serialization import canonical
from fedllm.lowrank import LowRank
from fedllm.config.rank_profiles import PROFILES
from fedllm.privacy.cohorts import uniform as sample
from fedllm.server.telemetry import measure

rule, population, size, modules, rounds = LOW_RANK[sys.argv[1]](), *map(int, sys.argv[2:])
ranks = PROFILES["moderate"]  # mean rank 16
clients = [Client(f"c{i}", 10 + i % 7, ranks[i % 10]) for i in range(population)]
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
state = canonical(rule.init(Model({f"m{i}": torch.empty(size, size, device="meta") for i in range(modules)}), clients))
for index in range(1, rounds + 1):
    rnd, replies = Round(index, 0), []
    for client in sample(clients, 15 / population, rnd):
        sent = canonical(rule.download(state, client, rnd))
        rng = rnd.rng(client.id)
        returned = {n: LowRank(M.B + 0.01 * torch.randn(M.B.shape, generator=rng), M.A) for n, M in sent.items()}
        replies.append(Reply(client, sent, returned))
    assert len(replies) == 15
    before, state = state, canonical(rule.aggregate(state, replies, rnd))
    measure(rule, before, state, replies)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024)
"""


def server_peak(rule: str, population: int, size: int, modules: int, rounds: int) -> int:
    """Peak resident bytes beyond the start of a server that plays rounds of 15 clients, in a process of its own."""
    arguments = [sys.executable, "-c", SERVER, rule, *map(str, (population, size, modules, rounds))]
    root = Path(__file__).parents[1]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, timeout=300, check=True)
    return int(done.stdout)


def test_the_server_s_memory_does_not_grow_with_clients_outside_the_cohort() -> None:
    """Llama-2-7B's shapes, 4 modules, mean rank 16, 15 clients a round, two rounds of FedHL, the telemetry included.

    100 clients peak where 15 do, but for the ranks of those drawn. An adapter a client that stays away would be
    4 * 16 * 8192 * 4 bytes = 2 MiB, 178 MiB for 85 of them.
    """
    few, many = (server_peak("fedhl", population, 4096, 4, 2) for population in (15, 100))
    assert abs(many - few) < 85 * 2**20, (few, many)


@pytest.mark.parametrize("name", [name for name in LOW_RANK if name != "fedalt"])  # which is about everybody's
def test_the_state_holds_the_cohort_s_sum_and_nobody_s_adapter(name: str) -> None:
    """15 of 15, of 100 and of 1,000 clients of rank 4, three rounds: the same bytes, but for eight a client met."""
    sizes = {}
    for population in (15, 100, 1000):
        rule, clients = LOW_RANK[name](), [Client(f"c{i}", 10, 4) for i in range(population)]
        state = canonical(rule.init(model({"m": (400, 300)}), clients))
        met = set()
        for index in (1, 2, 3):
            rnd, replies = Round(index, 0), []
            for client in sample(clients, 15 / population, rnd):
                sent = canonical(rule.download(state, client, rnd))
                ends = {n: stepped(M, index, client.id, n) for n, M in rule.expected(Reply(client, sent, {})).items()}
                replies.append(Reply(client, sent, ends))
                met.add(client.id)
            state = canonical(rule.aggregate(state, replies, rnd))
        tensors = [t for M in state.values() for t in ((M.B, M.A) if isinstance(M, LowRank) else (M,))]
        known = len([key for key in state if key.startswith("held/")])
        assert known in (0, len(met))
        sizes[population] = sum(t.numel() * t.element_size() for t in tensors) - 8 * known
    assert len(set(sizes.values())) == 1, sizes
