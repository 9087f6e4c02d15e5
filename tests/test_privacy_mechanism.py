"""Nobody's influence is larger than the clip, whatever a client returns; and what the mechanism leaves of each rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algorithms import RULES, clients_of, learned, model

from fedllm.core import Algorithm, Client, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.mean import pad
from fedllm.privacy import mechanism
from fedllm.server.admission import moved

SUMMED = {name: rule for name, rule in RULES.items() if rule.summed}
EVERY = pytest.mark.parametrize("name", SUMMED)
FACTOR_RULES = {"fedit", "fedlora_avg", "fedloru", "fedloru, every round", "fedloru, momentum", "ffa_lora"}


def trained(rule: Algorithm, state: Tensors, client: Client, rnd: Round, scale: float = 0.3) -> Reply:
    """B moved at random, each client its own way; A as it was sent."""
    sent = rule.download(state, client, rnd)
    expected = rule.expected(Reply(client, sent, sent))

    def step(key: str, B: torch.Tensor) -> torch.Tensor:
        return B + scale * torch.randn(B.shape, generator=rnd.rng("step", client.id, key))

    returned = {
        name: LowRank(step(name, S.B), S.A) if isinstance(S, LowRank) else step(name, S) for name, S in expected.items()
    }
    return Reply(client, sent, returned)


def private_step(
    rule: Algorithm, state: Tensors, clients: list[Client], replies: list[Reply], rnd: Round, **how: float
) -> Tensors:
    begun = mechanism.start(rule, state, clients, rnd)
    total = mechanism.summed(rule, begun, replies, how.get("clip", math.inf))
    reply = mechanism.released(
        begun, total, clip=how.get("clip", 1.0), noise_multiplier=how.get("z", 0.0), members=len(clients),
        noise=lambda shape: torch.randn(shape, dtype=torch.float64),
    )  # fmt: skip
    return rule.aggregate(state, [reply], rnd)


def after(rule: Algorithm, clients: list[Client], rounds: int) -> Tensors:
    """A state that some private rounds have made."""
    state = rule.init(model(learned(2)), clients)
    for index in range(1, rounds + 1):
        rnd = Round(index, 0)
        state = private_step(rule, state, clients, [trained(rule, state, c, rnd) for c in clients], rnd)
    return state


def hostile(reply: Reply, kind: str) -> Reply:
    def lie(M: LowRank | torch.Tensor) -> LowRank | torch.Tensor:
        B = M.B if isinstance(M, LowRank) else M
        worse = {
            "huge": B * 1e15,
            "nan": torch.full_like(B, math.nan),
            "infinite": torch.full_like(B, math.inf),
            "half": B[: len(B) // 2],
            "zero": torch.zeros_like(B),
        }.get(kind, B)
        if not isinstance(M, LowRank):
            return worse
        return LowRank(worse, M.A * 1e6 if kind == "A" else M.A)

    return replace(reply, returned={name: lie(M) for name, M in reply.returned.items()})


@EVERY
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_one_client_moves_the_sum_by_the_clip_at_most(name, data):
    rule = SUMMED[name]
    clients = clients_of(rule)
    state = after(rule, clients, data.draw(st.integers(0, 2)))
    rnd = Round(3, data.draw(st.integers(0, 99)))
    clip = data.draw(st.floats(1e-3, 10))
    kinds = ["honest", "huge", "nan", "infinite", "half", "zero", "A"]
    replies = [hostile(trained(rule, state, c, rnd), data.draw(st.sampled_from(kinds))) for c in clients]
    begun = mechanism.start(rule, state, clients, rnd)
    whole = mechanism.summed(rule, begun, replies, clip)
    for left_out in range(len(replies)):
        rest = mechanism.summed(rule, begun, replies[:left_out] + replies[left_out + 1 :], clip)
        assert mechanism.norm({n: whole[n] - rest[n] for n in whole}) <= clip * (1 + 1e-9)


@EVERY
def test_a_step_s_norm_is_that_of_its_products(name):
    rule = SUMMED[name]
    clients = clients_of(rule)
    state, rnd = after(rule, clients, 2), Round(3, 0)
    begun = mechanism.start(rule, state, clients, rnd)
    for client in clients:
        reply = trained(rule, state, client, rnd)
        sent = rule.expected(reply)
        c = mechanism.coordinates(begun, sent, reply.returned)
        assert mechanism.norm(c) == pytest.approx(moved(reply.returned, sent), rel=1e-6)
        far = mechanism.clipped(c, mechanism.norm(c) / 3)
        assert mechanism.norm(far) == pytest.approx(mechanism.norm(c) / 3, rel=1e-9)


def test_forgetting_the_clip_is_noticed():
    """The law above is one that a mechanism without a clip breaks."""
    rule, rnd = SUMMED["fedhl"], Round(1, 0)
    clients = clients_of(rule)
    state = rule.init(model(), clients)
    begun = mechanism.start(rule, state, clients, rnd)
    replies = [trained(rule, state, c, rnd) for c in clients]
    whole = mechanism.summed(rule, begun, replies, math.inf)
    rest = mechanism.summed(rule, begun, replies[1:], math.inf)
    assert mechanism.norm({n: whole[n] - rest[n] for n in whole}) > 0.1


@EVERY
def test_without_noise_and_clip_the_rule_is_its_B_only_form(name):
    """Rules on one rank and on products equal themselves with equal weights; those that cut or pad do not."""
    rule = SUMMED[name]
    if name in {"fedhl", "fedhl, no softmax", "fedhl, squared_norm", "fedhl, per module", "fedhl, r_i / sum r"}:
        rule = SUMMED["fedhl, n_i / n"]
    clients = [replace(client, num_samples=7) for client in clients_of(rule)]
    plain = private = rule.init(model(learned(2)), clients)
    for index in (1, 2, 3):
        rnd = Round(index, 0)
        if name in {"flexlora", "zero_padding"}:
            plain = private
            r = max(client.rank for client in clients)
            begun = mechanism.start(rule, private, clients, rnd)
            steps = {n: torch.zeros(*S.shape) for n, S in begun.expected.items()}
            for client in clients:
                reply = trained(rule, private, client, rnd)
                for n, S in rule.expected(reply).items():
                    steps[n] += pad(reply.returned[n] - S, 2 * r).dense() / len(clients)
            wanted = {n: S.dense() + steps[n] for n, S in begun.expected.items()}
        else:
            plain = rule.aggregate(plain, [trained(rule, plain, c, rnd) for c in clients], rnd)
            wanted = {n: W.dense() if isinstance(W, LowRank) else W for n, W in rule.served(plain).items()}
        private = private_step(rule, private, clients, [trained(rule, private, c, rnd) for c in clients], rnd)
        for n, W in rule.served(private).items():
            dense = W.dense() if isinstance(W, LowRank) else W
            assert float((dense - wanted[n]).norm()) <= 2e-5 * float(wanted[n].norm()) + 1e-5, n


@EVERY
def test_the_release_knows_neither_rows_nor_order(name):
    rule = SUMMED[name]
    clients = clients_of(rule)
    state, rnd = after(rule, clients, 1), Round(2, 0)
    replies = [trained(rule, state, c, rnd) for c in clients]
    begun = mechanism.start(rule, state, clients, rnd)
    total = mechanism.summed(rule, begun, replies, 0.5)
    others = [replace(reply, client=replace(reply.client, num_samples=999)) for reply in reversed(replies)]
    for n, part in mechanism.summed(rule, begun, others, 0.5).items():
        assert torch.equal(part, total[n])


@EVERY
def test_rounds_of_noise_alone_leave_a_state_that_goes_on(name):
    rule = SUMMED[name]
    clients = clients_of(rule)
    state = rule.init(model(), clients)
    for index in range(1, 7):
        rnd = Round(index, 0)
        cohort = [] if index == 4 else clients
        state = private_step(rule, state, clients, [trained(rule, state, c, rnd) for c in cohort], rnd, clip=0.5, z=1.0)
        for W in rule.served(state).values():
            assert bool(torch.isfinite(W.dense() if isinstance(W, LowRank) else W).all())


def test_noise_has_the_size_that_is_claimed_and_lies_in_the_rows_of_A():
    rule, rnd = SUMMED["fedhl"], Round(1, 0)
    clients = clients_of(rule)
    begun = mechanism.start(rule, rule.init(model(), clients), clients, rnd)
    total = mechanism.summed(rule, begun, [], 0.5)
    squares, beside = 0.0, 0.0
    for draw in range(300):
        noise = torch.Generator().manual_seed(draw)
        reply = mechanism.released(
            begun, total, clip=0.5, noise_multiplier=2.0, members=4,
            noise=lambda shape, g=noise: torch.randn(shape, generator=g, dtype=torch.float64),
        )  # fmt: skip
        M, S = reply.returned["q"], begun.expected["q"]
        apart = (M - S).dense().double()
        Q = torch.linalg.qr(S.A.double().T).Q
        squares += float(apart.square().sum())
        beside = max(beside, float((apart - apart @ Q @ Q.T).norm()))
    assert math.sqrt(squares / 300 / (12 * 6)) == pytest.approx(2.0 * 0.5 / 4, rel=0.02)
    assert beside < 1e-5


def test_a_rule_that_sends_other_rows_is_refused():
    rule, rnd = SUMMED["fedhl"], Round(1, 0)
    clients = clients_of(rule)
    state = rule.init(model(), clients)
    begun = mechanism.start(rule, state, clients, rnd)
    reply = trained(rule, state, clients[0], Round(2, 0))
    with pytest.raises(FedError, match="other rows"):
        mechanism.summed(rule, begun, [reply], 1.0)


def test_twice_the_same_id_counts_nothing():
    rule, rnd = SUMMED["fedhl"], Round(1, 0)
    clients = clients_of(rule)
    state = rule.init(model(), clients)
    begun = mechanism.start(rule, state, clients, rnd)
    reply = trained(rule, state, clients[0], rnd)
    assert mechanism.norm(mechanism.summed(rule, begun, [reply, reply], 1.0)) == 0.0


def test_what_is_summed_is_not_inherited():
    assert {name for name, rule in RULES.items() if rule.summed} >= FACTOR_RULES | {"flora", "fedhl", "flexlora"}
    for name in ("rolora", "mfedloru", "pfedloru", "zero_padding, HetLoRA's weights"):
        assert not RULES[name].summed
