"""Packed products: what they are off by, what they weigh, and that over the rounds a run loses nothing by them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedllm.algorithms import LOW_RANK
from fedllm.algorithms.lora.fedhl import FedHL
from fedllm.algorithms.lora.fedit import FedIT
from fedllm.algorithms.lora.fedloru import FedLoRU
from fedllm.algorithms.lora.flexlora import FlexLoRA
from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors, within
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.recipe.page import dump, load
from fedllm.server.admission import admit
from fedllm.server.robust import Clip
from fedllm.server.telemetry import measure
from fedllm.wire.compression import Compressed, Int8, Wire, fed_back, opened, packed
from fedllm.wire.serialization import canonical, flatten, size, unflatten

SHAPES = {"q": (40, 30), "v": (24, 30)}
MIXED = [Client("a", 30, 2), Client("b", 10, 3), Client("c", 25, 5)]
EQUAL = [Client(client.id, client.num_samples, 4) for client in MIXED]
WIRES: tuple[Literal["float16", "int8"], ...] = ("float16", "int8")


def product(d: int, r: int, k: int, *key: object) -> LowRank:
    rng = Round(0, 0).rng("product", *key)
    return LowRank(torch.randn(d, r, generator=rng), torch.randn(r, k, generator=rng))


# --- a packed product


@given(st.integers(1, 9), st.integers(0, 6), st.integers(1, 9), st.floats(-30, 30), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_eight_bits_are_off_by_half_a_step(d: int, r: int, k: int, power: float, seed: int) -> None:
    """At most absmax / 254 of each column of B and row of A, whatever their size; zero columns stay zero."""
    M = product(d, r, k, seed)
    M = LowRank(M.B * 2.0**power * (torch.arange(r) % 3 > 0), M.A)
    small = Int8.of(M)
    for given_, wanted in ((small.B.T, M.B.T), (small.A, M.A)):
        bound = wanted.abs().amax(dim=1, keepdim=True) / 254 if r else wanted
        assert bool(((given_ - wanted).abs() <= bound * (1 + 1e-5)).all())
    assert small.codes_B.dtype == small.codes_A.dtype == torch.int8
    again = Int8.of(small)
    assert torch.equal(again.codes_B, small.codes_B) and torch.equal(again.codes_A, small.codes_A)


def test_eight_bits_by_hand() -> None:
    """Column (127, -63.4, 0.6): scale 1, codes 127, -63, 1. Row (254, 1): scale 2, codes 127 and round(0.5) = 0."""
    small = Int8.of(LowRank(torch.tensor([[127.0], [-63.4], [0.6]]), torch.tensor([[254.0, 1.0]])))
    assert small.codes_B.T.tolist() == [[127, -63, 1]] and small.codes_A.tolist() == [[127, 0]]
    assert small.scale_B.tolist() == [1.0] and small.scale_A.tolist() == [2.0]
    assert small.dense().tolist() == [[127 * 254.0, 0.0], [-63 * 254.0, 0.0], [254.0, 0.0]]


def test_files_and_the_ledger_know_what_it_weighs() -> None:
    """To the byte what safetensors writes, through a file and back the same; rank 8 of 4096: 64 KiB and two scales."""
    tensors = {"w": Int8.of(product(4096, 8, 4096)), "n": torch.ones(3).half(), "x#b": torch.ones(2)}
    assert size(tensors) == len(save(flatten(tensors)))
    back = unflatten(flatten(tensors))
    assert isinstance(back["w"], Int8) and torch.equal(back["w"].B, tensors["w"].B)
    assert back.keys() == tensors.keys()
    assert size({"w": tensors["w"]}) - 8 * 2 * 4096 - 8 * 2 * 4 < 400  # codes, scales, and a header
    for precision, bytes_ in (("float32", 4), ("float16", 2), ("int8", 1)):
        weight = size(packed({"w": product(4096, 8, 4096)}, precision))  # type: ignore[arg-type]
        assert 0 <= weight - bytes_ * 8 * 2 * 4096 < 400


def test_what_is_no_product() -> None:
    given_ = {"norm": torch.tensor([1.0, 2.0]), "count": torch.tensor(7)}
    for precision in WIRES:
        sent = packed(given_, precision)
        assert sent["norm"].dtype == torch.float16 and sent["count"] is given_["count"]
        assert opened(sent)["norm"].dtype == torch.float32
    assert packed(given_, "float32") == given_


# --- error feedback


def test_what_is_owed_is_kept_to_the_last_digit() -> None:
    """sent + owed = M + what was owed before, up to what a rank less than the sum's leaves out (under a tenth)."""
    owed: LowRank | None = None
    for index in range(6):
        M = product(40, 4, 30, index)
        due = M.dense() + (owed.dense() if owed is not None else 0)
        sent, owed = fed_back(M, owed, "int8")
        lost = (due - sent.dense() - owed.dense()).norm()
        assert isinstance(sent, Int8) and owed.rank <= 4
        assert float(owed.dense().norm()) < 0.05 * float(M.norm()) and float(lost) < 0.01 * float(M.norm())


def test_feedback_of_dependent_rows_is_finite() -> None:
    """A fresh B is zero, rows of A may be equal, and a module may have no update at all."""
    A = torch.ones(3, 5)
    for M in (LowRank(torch.zeros(4, 3), A), LowRank(torch.zeros(4, 3), 0 * A), LowRank(torch.ones(4, 3), A)):
        sent, owed = fed_back(M, product(4, 2, 5), "int8")
        assert all(bool(torch.isfinite(t).all()) for t in (sent.B, sent.A, owed.B, owed.A))


class Still:
    """A worker whose step is the same in every round, and so small that eight bits hardly see it."""

    def __init__(self, client: Client, step: float) -> None:
        self.client, self.step = client, step

    def train(self, adapter: Tensors, memory: Tensors, rnd: Round, **others: Any) -> Any:
        moved = {
            name: LowRank(M.B + self.step * product(*M.B.shape, 1, self.client.num_samples, name).B, M.A)
            for name, M in adapter.items()
        }
        return moved, {}, {}


def model(update: Tensors | None = None) -> Model:
    return Model({name: torch.empty(*shape, device="meta") for name, shape in SHAPES.items()}, update or {})


def clients_of(rule: Algorithm) -> list[Client]:
    try:
        rule.validate(MIXED)
    except FedError:
        return EQUAL
    return MIXED


def played(
    rule: Algorithm, rounds: int, step: float = 0.3, forget: bool = False, start: Tensors | None = None
) -> dict[str, torch.Tensor]:
    clients = EQUAL if start else clients_of(rule)
    state = canonical(rule.init(model(start), clients))
    memories: dict[str, Tensors] = {}
    for index in range(1, rounds + 1):
        rnd, replies = Round(index, 0), []
        for client in clients:
            sent = canonical(rule.download(state, client, rnd))
            memory = {} if forget else memories.get(client.id, {})
            returned, memory, metrics = rule.local(Still(client, step), sent, memory, rnd)
            memories[client.id] = canonical(memory)
            replies.append(Reply(client, sent, canonical(returned), metrics))
        admitted, refused = admit(replies, rule.expected, norm_bound=100.0)
        assert not refused
        state = canonical(rule.aggregate(state, admitted, rnd))
    return {name: W.dense() if isinstance(W, LowRank) else W for name, W in rule.served(state).items()}


def distance(given_: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(float((given_[n] - W).norm() / W.norm()) for n, W in wanted.items())


@pytest.mark.parametrize("precision", WIRES)
@pytest.mark.parametrize(
    "name", [name for name in LOW_RANK if name not in {"pfedloru", "mfedloru", "fedsa_lora", "fed_sb"}]
)
def test_every_rule_serves_nearly_what_it_serves_uncompressed(name: str, precision: Any) -> None:
    """Eight rounds, both ways: within 3 % in eight bits, 0.2 % in sixteen.

    Four of raFLoRA: the place of a singular direction says who shares it, and in the fifth two of them change places.
    """
    rounds = 4 if name == "raflora" else 8
    exact = played(LOW_RANK[name](), rounds)
    given_ = played(Compressed(LOW_RANK[name](), precision, precision), rounds)
    assert 0 < distance(given_, exact) < {"float16": 2e-3, "int8": 3e-2}[precision]


@pytest.mark.parametrize("name", ["pfedloru", "mfedloru", "fedsa_lora", "fed_sb"])
def test_the_others_run_as_well(name: str) -> None:
    """Their workers train more than adapters, or nothing is served; through the pack they get what they would."""
    rule = LOW_RANK[name]()
    clients = [dataclasses.replace(client, rank=2 if name == "mfedloru" else 4) for client in MIXED]
    small = Compressed(rule, "int8", "int8")
    state = small.init(model(), clients)

    class Echo:
        def train(self, adapter: Tensors, memory: Tensors, rnd: Round, **others: Any) -> Any:
            return others.get("nested") or adapter, {}, {}

        def score(self, update: Tensors) -> dict[str, float]:
            return {}

    replies = []
    for client in clients:
        sent = canonical(small.download(state, client, Round(1, 0)))
        returned, memory, _ = small.local(Echo(), sent, {}, Round(1, 0))
        replies.append(Reply(client, sent, canonical(returned)))
        assert small.personal(replies[-1], memory).keys() >= SHAPES.keys()
    assert admit(replies, small.expected)[1] == {}
    state = small.aggregate(state, replies, Round(1, 0))
    assert all(float(M.norm()) < 1e-6 for M in small.served(state).values())


@pytest.mark.parametrize("rule", [FedIT(), FlexLoRA(), FedHL()], ids=lambda rule: type(rule).__name__)
def test_feedback_brings_back_what_rounding_took(rule: Algorithm) -> None:
    """Steps below half of the grid: each alone rounds to nothing, so without feedback 40 of them hardly move W.

    With the residual remembered they add up and arrive, to within the rounding of a single upload.
    """
    start = {name: product(d, 4, k, name) for name, (d, k) in SHAPES.items()}
    small, step = Compressed(rule, "float32", "int8"), 3e-3
    exact = played(rule, 40, step, start=start)
    way = {name: W - start[name].dense() for name, W in exact.items()}
    kept, lost = (
        {name: W - start[name].dense() for name, W in played(small, 40, step, forget, start).items()}
        for forget in (False, True)
    )
    assert distance(lost, way) > 0.7 and distance(kept, way) < 0.4, (distance(lost, way), distance(kept, way))


@pytest.mark.parametrize("precision", ["int8", "float16"])
@pytest.mark.parametrize("spectrum", [(1, 1e-2, 1e-4, 1e-5), (1, 1e-3, 1e-6, 1e-7), (1e-3, 1e-3, 1e-3, 1e-3)])
def test_what_is_owed_stays_small_where_little_can_carry_it(precision: Any, spectrum: tuple[float, ...]) -> None:
    """Uploads that are nearly of lower rank, or a thousandth of those before: the debt never exceeds the first one's.

    Carried by rows and columns at once, it came back multiplied every round.
    """
    rng = Round(1, 3).rng("owed")
    U, V = (torch.linalg.qr(torch.randn(n, 4, generator=rng)).Q for n in (40, 30))
    first = LowRank(U, V.T)  # four directions of length 1
    _, residual = fed_back(first, None, precision)
    root = torch.tensor(spectrum).sqrt()
    M, most = LowRank(U * root, root[:, None] * V.T), residual.norm()
    for _ in range(12):
        sent, residual = fed_back(M, residual, precision)
        one_rounding = fed_back(M, None, precision)[1].norm()
        assert residual.norm() <= 1.01 * (most + one_rounding)
        assert (opened({"M": sent})["M"] - M).norm() <= 2.5 * (most + one_rounding)


@pytest.mark.parametrize("rule", [FedIT(), FlexLoRA(), FedHL(), FedLoRU()], ids=lambda rule: type(rule).__name__)
def test_rounding_a_download_moves_nothing(rule: Algorithm) -> None:
    """Clients that return what arrived: 30 rounds of eight bits down leave W where full precision leaves it, to 1e-4.

    Without the correction every round would round it anew.
    """
    W = {name: product(d, 2, k, name) for name, (d, k) in SHAPES.items()}
    small = Compressed(rule, "int8", "float32")
    clients = clients_of(rule)
    state = canonical(small.init(model(W), clients))
    for index in range(1, 31):
        rnd = Round(index, 0)
        replies = []
        for client in clients:
            sent = canonical(small.download(state, client, rnd))
            replies.append(Reply(client, sent, dict(opened(within("adapter", sent) or sent))))
        state = canonical(small.aggregate(state, replies, rnd))
    served = {n: M.dense() if isinstance(M, LowRank) else M for n, M in small.served(state).items()}
    assert distance(served, {n: M.dense() for n, M in W.items()}) < 1e-4
    first = opened(small.download(small.init(model(W), clients), clients[-1], Round(1, 0)))
    if not isinstance(rule, FedLoRU):
        assert distance({n: first[n].dense() for n in W}, {n: M.dense() for n, M in W.items()}) > 1e-3, "it is rounded"


def test_guards_and_telemetry_read_packed_replies() -> None:
    """A client that moved a thousand times as far is clipped; the round's numbers are close to the exact ones."""
    small = Compressed(FedHL(), "int8", "int8")
    state = small.init(model(), MIXED)
    given_ = {}
    for rule in (small, FedHL()):
        replies = []
        for client in MIXED:
            sent = canonical(rule.download(state, client, Round(1, 0)))
            step = 300.0 if client.id == "c" else 0.3
            returned, _, _ = rule.local(Still(client, step), sent, {}, Round(1, 0))
            replies.append(Reply(client, sent, canonical(returned)))
        kept, notes = Clip(bound=2.0).guard(rule, replies)
        assert list(notes) == ["c"]
        given_[type(rule)] = measure(rule, state, rule.aggregate(state, kept, Round(1, 0)), kept)
    ours, theirs = given_[Compressed], given_[FedHL]
    assert ours["drift"] == pytest.approx(theirs["drift"], rel=0.02)
    assert ours["cosine"] == pytest.approx(theirs["cosine"], abs=0.02)


# --- the recipe


def test_the_wire_of_a_recipe(tmp_path: Any) -> None:
    plain = load(["recipe=smoke"])
    assert plain.wire == Wire() and isinstance(plain.algorithm, FedHL)
    recipe = load(["recipe=smoke", "wire.up=int8", "wire.down=float16"])
    assert recipe.algorithm == Compressed(FedHL(), "float16", "int8") and recipe.algorithm.network == ""
    assert recipe.page["wire"] == {"down": "float16", "up": "int8"} and recipe.page["algorithm"]["name"] == "fedhl"
    page = tmp_path / "smoke.yaml"
    page.write_text(dump(recipe))
    assert load([f"recipe={page}"]) == recipe
    with pytest.raises(FedError, match=r"wire\.up='int4'"):
        load(["recipe=smoke", "wire.up=int4"])
