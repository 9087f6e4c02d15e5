"""Laws that every rule of the table obeys, and numbers that can be checked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm.algorithms import LOW_RANK
from fedllm.algorithms.lora.fed_plora import FedPLoRA
from fedllm.algorithms.lora.fedhl import FedHL
from fedllm.algorithms.lora.fedit import FedIT
from fedllm.algorithms.lora.fedloru import FedLoRU
from fedllm.algorithms.lora.flexlora import FlexLoRA
from fedllm.algorithms.lora.flora import FLoRA
from fedllm.algorithms.lora.florist import FLoRIST
from fedllm.algorithms.lora.mfedloru import MFedLoRU
from fedllm.algorithms.lora.zero_padding import ZeroPadding
from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors, within
from fedllm.errors import FedError
from fedllm.lowrank import LowRank

Matrix = NDArray[np.float64]

RULES: dict[str, Algorithm] = {
    **{name: rule() for name, rule in LOW_RANK.items()},
    "fedloru, every round": FedLoRU(tau=1),
    "fedloru, momentum": FedLoRU(tau=2, reset="momentum"),
    "mfedloru, every other round": MFedLoRU(tau=2),
    "zero_padding, HetLoRA's weights": ZeroPadding(weights="norm"),
    "fedhl, no softmax": FedHL(temperature=None),
    "fedhl, squared_norm": FedHL(truncation_error="squared_norm", temperature=None),
    "fedhl, per module": FedHL(weights_per="module", temperature=None),
    "fedhl, n_i / n": FedHL(weights="fedavg"),
    "fedhl, r_i / sum r": FedHL(weights="rank"),
}
"""The whole table as it is constructed without arguments, and every option that changes what is averaged."""

EVERY = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
FEDHL = pytest.mark.parametrize(
    "rule",
    [rule for rule in RULES.values() if isinstance(rule, FedHL)],
    ids=[name for name in RULES if "fedhl" in name],
)

SHAPES = {"q": (12, 10), "v": (6, 10)}
MIXED = [Client("a", 30, 2), Client("b", 10, 3), Client("c", 25, 5), Client("d", 35, 6)]
EQUAL = [replace(client, rank=3) for client in MIXED]
ROUND = Round(1, seed=0)


def clients_of(rule: Algorithm) -> list[Client]:
    """Clients of mixed rank, or of one rank where the rule says that it needs one."""
    try:
        rule.validate(MIXED)
    except FedError:
        return EQUAL
    return MIXED


def product(rank: int, shape: tuple[int, int], *key: object) -> LowRank:
    """Random factors of their own for every key."""
    generator = Round(0, 0).rng("product", *key)
    return LowRank(torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator))


def model(update: Tensors | None = None, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> Model:
    return Model({name: torch.empty(*shape, device="meta") for name, shape in shapes.items()}, update or {})


def learned(rank: int = 6) -> dict[str, LowRank]:
    """An update of some rounds ago."""
    return {name: product(rank, shape, "learned", name) for name, shape in SHAPES.items()}


def starts(rule: Algorithm, client: Client, sent: Tensors) -> Tensors:
    """The adapters that a client sets out from."""
    reply = Reply(client, sent, {})
    return within("adapter", sent) or rule.trained(replace(reply, returned=rule.expected(reply)))


Training = Callable[[Client, str, LowRank], LowRank]


def unmoved(client: Client, name: str, start: LowRank) -> LowRank:
    return start


def moved(client: Client, name: str, start: LowRank) -> LowRank:
    """Somewhere else, which depends on the rows that a client holds and not on what it is called."""
    step = product(start.rank, start.shape, client.num_samples, name)
    return LowRank(start.B + 0.3 * step.B, start.A + 0.3 * step.A)


def asked(
    rule: Algorithm, state: Tensors, clients: Sequence[Client], train: Training, rnd: Round = ROUND
) -> list[Reply]:
    """Every client's reply, were it to train like this."""
    replies = []
    for client in clients:
        sent = rule.download(state, client, rnd)
        starts = rule.expected(Reply(client, sent, {}))
        returned = {
            name: train(client, name, start)
            if isinstance(start, LowRank)
            else train(client, name, LowRank(start, torch.eye(start.shape[1]))).dense()
            for name, start in starts.items()
        }
        replies.append(Reply(client, sent, returned))
    return replies


def played(rule: Algorithm, state: Tensors, clients: Sequence[Client], train: Training, rounds: int = 1) -> Tensors:
    for index in range(1, rounds + 1):
        rnd = Round(index, seed=0)
        state = rule.aggregate(state, asked(rule, state, clients, train, rnd), rnd)
    return state


def dense(W: Tensor | LowRank) -> Matrix:
    if isinstance(W, LowRank):
        return W.B.double().numpy() @ W.A.double().numpy()
    return W.double().numpy()


def served(rule: Algorithm, state: Tensors) -> dict[str, Matrix]:
    return {name: dense(W) for name, W in rule.served(state).items()}


def best(W: Matrix, r: int) -> Matrix:
    U, S, Vt = np.linalg.svd(W)
    return (U[:, :r] * S[:r]) @ Vt[:r]


def same(given: Mapping[str, Matrix], wanted: Mapping[str, Matrix], relative: float) -> None:
    assert given.keys() == wanted.keys()
    for name, matrix in wanted.items():
        assert np.linalg.norm(given[name] - matrix) <= relative * np.linalg.norm(matrix), name


def bits(tensors: Tensors) -> dict[str, bytes]:
    """Every number, to the bit."""
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        flat |= {f"{name}.B": value.B, f"{name}.A": value.A} if isinstance(value, LowRank) else {name: value}
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in flat.items()}


# --- what must hold, one to six


@pytest.mark.parametrize("rule", [FlexLoRA(), FLoRA(), FedHL(), FedHL(temperature=None)], ids=str)
def test_1_from_nothing_the_products_are_averaged(rule: Algorithm) -> None:
    """sum p_i M_i, exactly; FedHL's weights are equal where W = 0, so its clients have equal counts here."""
    clients = [replace(client, num_samples=20 + i * (not isinstance(rule, FedHL))) for i, client in enumerate(MIXED)]
    start = rule.init(model(), clients)
    replies = asked(rule, start, clients, lambda c, n, s: product(c.rank, s.shape, c.id, n))
    n = sum(client.num_samples for client in clients)
    wanted = {name: sum(r.client.num_samples / n * dense(r.returned[name]) for r in replies) for name in SHAPES}
    same(served(rule, rule.aggregate(start, replies, ROUND)), wanted, 1e-5)


STAYS = {name: name not in {"zero_padding", "flexlora", "hetlora"} for name in LOW_RANK}


@pytest.mark.parametrize(("name", "stays"), STAYS.items())
def test_2_clients_that_return_what_they_were_sent(name: str, stays: bool) -> None:
    """Most rules do not move; FlexLoRA and zero-padding lose what a small client could not hold."""
    rule = LOW_RANK[name]()
    clients = clients_of(rule)
    before = rule.init(model(learned(rank=3 if clients is EQUAL else 6)), clients)
    after = served(rule, played(rule, before, clients, unmoved))
    distance = max(np.linalg.norm(after[n] - W) / (np.linalg.norm(W) or 1) for n, W in served(rule, before).items())
    assert distance <= 1e-6 if stays else distance > 0.05


@FEDHL
@pytest.mark.parametrize("rank", [2, 4, 6, 10], ids="rank {}".format)
def test_2_fedhl_never_moves_by_itself(rule: FedHL, rank: int) -> None:
    """However large the rank of W is next to the clients', and (10: dense) however it is stored."""
    before = rule.init(model(learned(rank)), MIXED)
    assert isinstance(rule.served(before)["q"], LowRank if rank < 6 else Tensor)
    for rounds in (1, 5):
        same(served(rule, played(rule, before, MIXED, unmoved, rounds)), served(rule, before), 1e-6)


def test_2_flexlora_moves_only_when_the_rank_is_above_the_smallest_client() -> None:
    rule = FlexLoRA()
    for rank, stays in [(1, True), (2, True), (3, False)]:
        before = rule.init(model(learned(rank)), MIXED)
        after = served(rule, played(rule, before, MIXED, unmoved))
        distance = max(np.linalg.norm(after[n] - W) / np.linalg.norm(W) for n, W in served(rule, before).items())
        assert distance <= 1e-6 if stays else distance > 0.01, rank


@EVERY
def test_3_alpha_cancels(rule: Algorithm) -> None:
    """A client's scale s reaches the server only as s B: alpha 2, B / 2 and alpha 1, B give one LowRank, to the bit.

    test_aggregate has the same law on PEFT folders of different alpha.
    """
    clients = clients_of(rule)
    start = rule.init(model(learned(3)), clients)
    replies = asked(rule, start, clients, moved)
    folded = [
        replace(
            r,
            returned={n: LowRank(M.B / 2, M.A) * 2.0 if isinstance(M, LowRank) else M for n, M in r.returned.items()},
        )
        for r in replies
    ]
    assert bits(rule.aggregate(start, folded, ROUND)) == bits(rule.aggregate(start, replies, ROUND))


@EVERY
def test_4_the_order_of_clients_changes_nothing(rule: Algorithm) -> None:
    clients = clients_of(rule)
    start = played(rule, rule.init(model(), clients), clients, moved, rounds=2)
    replies = asked(rule, start, clients, moved)
    wanted = served(rule, rule.aggregate(start, replies, ROUND))
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        same(served(rule, rule.aggregate(start, [replies[i] for i in order], ROUND)), wanted, 1e-6)


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if not isinstance(rule, FedPLoRA)], ids=str)
def test_4_the_names_of_clients_change_nothing(rule: Algorithm) -> None:
    """Through two rounds, downloads included: ids are for reports. Fed-PLoRA draws each client's columns by its id."""
    clients = clients_of(rule)
    renamed = [replace(client, id=f"hospital {i}") for i, client in enumerate(clients)]
    first, second = (
        served(rule, played(rule, rule.init(model(), those), those, moved, rounds=2)) for those in (clients, renamed)
    )
    same(second, first, 1e-6)


def test_5_flexlora_alone_serves_its_client() -> None:
    alone = [Client("only", 7, 4)]
    rule = FlexLoRA()
    start = rule.init(model(), alone)
    replies = asked(rule, start, alone, lambda c, n, s: product(c.rank, s.shape, n))
    wanted = {name: dense(M) for name, M in replies[0].returned.items()}
    same(served(rule, rule.aggregate(start, replies, ROUND)), wanted, 1e-6)


def test_6_zero_padding_with_equal_ranks_is_fedit() -> None:
    """To the bit, through three rounds."""
    states = [played(rule, rule.init(model(), EQUAL), EQUAL, moved, rounds=3) for rule in (FedIT(), ZeroPadding())]
    assert bits(states[0]) == bits(states[1])


@FEDHL
def test_6_fedhl_within_the_clients_rank_is_flexlora(rule: FedHL) -> None:
    """Equal ranks, rank(W) <= r: W - W^(r) = 0, so FedHL serves FlexLoRA's average with FedHL's own weights."""
    before = rule.init(model(learned(3)), EQUAL)
    replies = asked(rule, before, EQUAL, moved)
    p = rule.shares(before, replies)
    weighted = [replace(r, client=replace(r.client, num_samples=round(p[r.client.id] * 10**12))) for r in replies]
    flexlora = FlexLoRA()
    wanted = served(flexlora, flexlora.aggregate(flexlora.init(model(learned(3)), EQUAL), weighted, ROUND))
    same(served(rule, rule.aggregate(before, replies, ROUND)), wanted, 1e-5)


# --- laws over the whole table


@pytest.mark.parametrize(
    "rule", [replace(r, threshold=1.0) if isinstance(r, FLoRIST) else r for r in RULES.values()], ids=list(RULES)
)
def test_identical_clients_average_to_themselves(rule: Algorithm) -> None:
    """FLoRIST where it cuts nothing."""
    clients = [replace(client, rank=4) for client in MIXED]
    start = rule.init(model(), clients)
    replies = asked(rule, start, clients, lambda c, n, s: product(c.rank, s.shape, n))
    wanted = {name: dense(M) for name, M in rule.trained(replies[0]).items()}
    same(served(rule, rule.aggregate(start, replies, ROUND)), wanted, 1e-6)


@EVERY
def test_hooks_change_nothing_they_were_given(rule: Algorithm) -> None:
    """Nor the global generator, which belongs to the training loop; and what they return is what they return again."""
    clients = clients_of(rule)
    rule.validate(clients)
    start = model(learned(3))
    given = bits(start.update)
    state = played(rule, rule.init(start, clients), clients, moved)
    assert bits(start.update) == given

    generator = torch.get_rng_state()
    given = bits(state)
    sent = [rule.download(state, client, ROUND) for client in clients]
    sent_bits = [bits(tensors) for tensors in sent]
    replies = asked(rule, state, clients, moved)
    returned_bits = [bits(reply.returned) for reply in replies]
    after = rule.aggregate(state, replies, ROUND)
    after_bits = bits(after)
    rule.served(after)
    rule.shares(state, replies)
    for client, reply in zip(clients, replies, strict=True):
        rule.truncated(state, client)
        rule.personal(reply, {})
    assert bits(state) == given
    assert [bits(reply.sent) for reply in replies] == sent_bits == [bits(tensors) for tensors in sent]
    assert [bits(reply.returned) for reply in replies] == returned_bits
    assert bits(rule.aggregate(state, replies, ROUND)) == after_bits == bits(after)
    assert torch.equal(torch.get_rng_state(), generator)


@EVERY
def test_shares_are_a_distribution(rule: Algorithm) -> None:
    clients = clients_of(rule)
    state = rule.init(model(learned(3)), clients)
    for _ in range(2):
        replies = asked(rule, state, clients, moved)
        shares = rule.shares(state, replies)
        assert list(shares) == [client.id for client in clients]
        assert min(shares.values()) > 0 and sum(shares.values()) == pytest.approx(1.0, abs=1e-9)
        state = rule.aggregate(state, replies, ROUND)


@EVERY
def test_every_download_can_train_at_its_clients_rank(rule: Algorithm) -> None:
    """Factors of exactly rank r_i, no zero row in A (with B = 0 there, it would never train), nested over clients.

    mFedLoRU sends everybody rank r; its clients' own ranks are those of the nested factors.
    """
    clients = clients_of(rule)
    for state in (rule.init(model(), clients), rule.init(model(learned(1)), clients)):
        adapters = [starts(rule, c, rule.download(state, c, ROUND)) for c in clients]
        largest = adapters[-1]
        for client, adapter in zip(clients, adapters, strict=True):
            for name in SHAPES:
                start, other = adapter[name], largest[name]
                assert isinstance(start, LowRank) and isinstance(other, LowRank)
                assert start.rank == (6 if isinstance(rule, MFedLoRU) else client.rank) and bool(
                    (start.A != 0).any(dim=1).all()
                )
                assert torch.equal(start.A, other.A[: start.rank]) or isinstance(rule, FedPLoRA)  # draws its rows


@EVERY
def test_the_first_round_starts_from_the_base_model(rule: Algorithm) -> None:
    clients = clients_of(rule)
    state = rule.init(model(), clients)
    for client in clients:
        for start in starts(rule, client, rule.download(state, client, ROUND)).values():
            assert not dense(start).any()
    assert not any(W.any() for W in served(rule, state).values())
    assert [rule.truncated(state, client) for client in clients] == [0.0] * len(clients)


SENT: dict[str, Callable[[LowRank, int], Matrix]] = {
    "fedit": lambda W, r: dense(W),
    "zero_padding": lambda W, r: dense(W.leading(r)),
    "flexlora": lambda W, r: best(dense(W), r),
    "flora": lambda W, r: 0 * dense(W),  # the adapter; W itself travels frozen
    "fedhl": lambda W, r: best(dense(W), r),
    "fedlora_avg": lambda W, r: dense(W),
    "fedloru": lambda W, r: 0 * dense(W),  # likewise, W to be remembered
    "pfedloru": lambda W, r: 0 * dense(W),
    "mfedloru": lambda W, r: 0 * dense(W),
    "ffa_lora": lambda W, r: dense(W),
    "rolora": lambda W, r: dense(W),
    "fedsvd": lambda W, r: dense(W),
    "fedex_lora": lambda W, r: 0 * dense(W),  # likewise frozen
    "fedmomentum": lambda W, r: 0 * dense(W),
    "rbla": lambda W, r: dense(W.leading(r)),
    "raflora": lambda W, r: best(dense(W), r),
    "florist": lambda W, r: 0 * dense(W),
    "lora_fair": lambda W, r: dense(W),
    "fedrot_lora": lambda W, r: dense(W),
    "feddpa": lambda W, r: dense(W),
    "hetlora": lambda W, r: dense(W.leading(r)),
    "fedalt": lambda W, r: dense(W),  # its own; the others' mean is frozen
}
FROZEN = {"flora": "frozen", "fedloru": "W", "pfedloru": "W", "mfedloru": "W"}
FROZEN |= dict.fromkeys(("fedex_lora", "fedmomentum", "florist"), "frozen")
HELD = {name: (lambda W, r: dense(W)) if name in FROZEN else sent for name, sent in SENT.items()}
"""What a client works on: what it was sent, and what it was sent frozen."""


def test_those_that_send_something_else_have_a_test_of_their_own() -> None:
    assert LOW_RANK.keys() - SENT.keys() == {
        "fed_plora",
        "fedsa_lora",
        "fed_sb",
    }  # the latter two by hand, in test_newer_rules


def test_fed_plora_sends_all_of_what_is_served() -> None:
    """Some columns to train and the others frozen, at any rank."""
    rule = LOW_RANK["fed_plora"]()
    state = rule.init(model(learned(6)), MIXED)
    for client in MIXED:
        sent = rule.download(state, client, ROUND)
        assert sent["adapter/q"].rank == client.rank and rule.truncated(state, client) == 0.0
        together = {name: dense(sent[f"adapter/{name}"]) + dense(sent[f"frozen/{name}"]) for name in SHAPES}
        same(together, served(rule, state), 1e-6)


@pytest.mark.parametrize("name", [name for name in LOW_RANK if name in SENT])
def test_what_a_client_is_sent_and_what_it_cannot_hold(name: str) -> None:
    rule = LOW_RANK[name]()
    clients = clients_of(rule)
    W = learned(3 if clients is EQUAL else 6)
    state = rule.init(model(W), clients)
    for client in clients:
        sent = rule.download(state, client, ROUND)
        adapter = {key: dense(start) for key, start in starts(rule, client, sent).items()}
        for key, matrix in W.items():
            assert np.linalg.norm(adapter[key] - SENT[name](matrix, client.rank)) <= 1e-5 * matrix.norm()
            if name in FROZEN:
                frozen = sent[f"{FROZEN[name]}/{key}"]
                assert np.linalg.norm(dense(frozen) - dense(matrix)) <= 1e-6 * matrix.norm()
        lost = math.sqrt(sum(np.linalg.norm(dense(M) - HELD[name](M, client.rank)) ** 2 for M in W.values()))
        scale = math.sqrt(sum(M.norm() ** 2 for M in W.values()))
        assert rule.truncated(state, client) == pytest.approx(lost, rel=1e-5, abs=1e-6 * scale)


@EVERY
def test_the_state_stops_growing(rule: Algorithm) -> None:
    """After some rounds a round adds no number to keep; what sums up (FLoRA, FedHL) is dense from then on."""
    clients = clients_of(rule)
    state = rule.init(model(), clients)
    sizes, kinds = [], []
    for index in range(1, 13):
        rnd = Round(index, seed=0)
        state = rule.aggregate(state, asked(rule, state, clients, moved, rnd), rnd)
        sizes.append(sum(len(data) for data in bits(state).values()))
        kinds.append({type(W) for W in rule.served(state).values()})
    assert len(set(sizes[5:])) == 1, sizes
    assert all(kind == kinds[5] for kind in kinds[5:])
    if isinstance(rule, FLoRA | FedHL):
        assert kinds[3] == {Tensor}


@FEDHL
def test_a_round_of_fedhl_adds_at_most_the_clients_ranks(rule: FedHL) -> None:
    """W^(r_i) lies in W's own spaces: rank(W_{t+1}) <= rank(W_t) + sum r_i, not + 2 sum r_i."""
    clients = [Client("a", 3, 1), Client("b", 5, 2)]
    shapes = {"q": (60, 50)}
    state = rule.init(model(shapes=shapes), clients)
    ranks = [0]
    for index in range(1, 7):
        rnd = Round(index, seed=0)
        train: Training = lambda c, n, s, index=index: s + product(c.rank, s.shape, c.id, index)  # noqa: E731
        steps = asked(rule, state, clients, train, rnd)
        full = [replace(r, returned={n: M.truncate(r.client.rank) for n, M in r.returned.items()}) for r in steps]
        state = rule.aggregate(state, full, rnd)
        W = rule.served(state)["q"]
        assert isinstance(W, LowRank)
        ranks.append(W.rank)
    assert all(after <= before + 3 for before, after in zip(ranks, ranks[1:], strict=False)), ranks
    assert ranks[-1] > 3, "it must have grown for this to mean anything"


@pytest.mark.parametrize("ranks", [(2, 4), (1, 2, 3)])
def test_fedit_names_the_ranks_it_cannot_average(ranks: tuple[int, ...]) -> None:
    with pytest.raises(FedError, match=str(sorted(ranks)).replace("[", r"\[")):
        FedIT().validate([Client(str(r), 1, r) for r in ranks])


# --- numbers by hand


def outer(b: Sequence[float], a: Sequence[float]) -> LowRank:
    return LowRank(torch.tensor([b]).T, torch.tensor([a]))


def by_hand(rule: Algorithm, returned: Sequence[LowRank], samples: Sequence[int], W: Tensor | None = None) -> Matrix:
    """What a rule serves after one round of a 2 x 2 weight; client i has samples[i] rows and the rank it returned."""
    clients = [Client(str(i), n, M.rank) for i, (n, M) in enumerate(zip(samples, returned, strict=True))]
    state = rule.init(model({} if W is None else {"w": diag(*W.tolist())}, {"w": (2, 2)}), clients)
    replies = asked(rule, state, clients, lambda c, n, s: returned[int(c.id)])
    return served(rule, rule.aggregate(state, replies, ROUND))["w"]


def diag(*values: float) -> LowRank:
    return LowRank(torch.diag(torch.tensor(values)), torch.eye(len(values)))


ONE, TWO = outer([1.0, 0.0], [2.0, 0.0]), outer([0.0, 1.0], [0.0, 4.0])


def test_fedit_by_hand() -> None:
    """p = (1/4, 3/4): B = (1/4, 3/4), A = (2/4, 12/4), B A = [[1/8, 3/4], [3/8, 9/4]].

    M_1 = diag(2, 0) and M_2 = diag(0, 4): the products' mean is diag(1/2, 3), and the rest is cross terms.
    """
    np.testing.assert_allclose(by_hand(FedIT(), [ONE, TWO], [1, 3]), [[0.125, 0.75], [0.375, 2.25]], rtol=1e-6)


def test_zero_padding_by_hand() -> None:
    """Ranks 1 and 2, p = (1/4, 3/4).

    B_1 = [[1, 0], [0, 0]] and B_2 = I: B = diag(1, 3/4). A_1 = [[2, 0], [0, 0]] and A_2 = [[0, 6], [0, 4]]:
    A = [[1/2, 9/2], [0, 3]]. B A = [[1/2, 9/2], [0, 9/4]].
    """
    second = LowRank(torch.eye(2), torch.tensor([[0.0, 6.0], [0.0, 4.0]]))
    np.testing.assert_allclose(by_hand(ZeroPadding(), [ONE, second], [1, 3]), [[0.5, 4.5], [0, 2.25]], rtol=1e-6)


def test_hetlora_s_weights_by_hand() -> None:
    """|M_1| = 2 and |M_2| = 6, so p = (1/4, 3/4) whatever the counts are.

    B = diag(1, 3/4) as above, A = 1/4 [[2, 0], [0, 0]] + 3/4 [[0, 6], [0, 0]] = [[1/2, 9/2], [0, 0]].
    """
    second = LowRank(torch.eye(2), torch.tensor([[0.0, 6.0], [0.0, 0.0]]))
    given = by_hand(ZeroPadding(weights="norm"), [ONE, second], [50, 1])
    np.testing.assert_allclose(given, [[0.5, 4.5], [0, 0]], rtol=1e-6)


def test_hetlora_s_weights_sum_squares_over_the_modules() -> None:
    """Norms 3 and 4 in two modules make 5; the other client's are 5 and 0: shares 1/2 and 1/2."""
    first = {"a": diag(3.0, 0.0), "b": diag(4.0, 0.0)}
    second = {"a": diag(5.0, 0.0), "b": diag(0.0, 0.0)}
    replies = [Reply(Client(str(i), 1, 2), {}, returned) for i, returned in enumerate((first, second))]
    assert ZeroPadding(weights="norm").shares({}, replies) == pytest.approx({"0": 0.5, "1": 0.5})


def test_flexlora_by_hand() -> None:
    """1/4 diag(2, 0) + 3/4 diag(0, 4) = diag(1/2, 3), whatever W was before."""
    for W in (None, torch.tensor([7.0, 5.0])):
        np.testing.assert_allclose(by_hand(FlexLoRA(), [ONE, TWO], [1, 3], W), np.diag([0.5, 3.0]), atol=1e-6)


def test_a_truncated_download_by_hand() -> None:
    """W = diag(4, -9): the best of rank 1 is diag(0, -9), balanced as B = (0, 3), A = (0, -3); e = 4."""
    clients = [Client("small", 1, 1), Client("large", 1, 2)]
    for rule in (FlexLoRA(), FedHL()):
        state = rule.init(model({"w": diag(4.0, -9.0)}, {"w": (2, 2)}), clients)
        sent = rule.download(state, clients[0], ROUND)["w"]
        assert isinstance(sent, LowRank)
        torch.testing.assert_close(sent.B, torch.tensor([[0.0], [3.0]]))
        torch.testing.assert_close(sent.A, torch.tensor([[0.0, -3.0]]))
        assert rule.truncated(state, clients[0]) == pytest.approx(4.0)
        assert rule.truncated(state, clients[1]) == pytest.approx(0.0, abs=1e-5)


def test_flora_by_hand() -> None:
    """diag(7, 5) + 1/4 diag(2, 0) + 3/4 diag(0, 4) = diag(7.5, 8)."""
    given = by_hand(FLoRA(), [ONE, TWO], [1, 3], torch.tensor([7.0, 5.0]))
    np.testing.assert_allclose(given, np.diag([7.5, 8.0]), atol=1e-6)


def test_fedhl_by_hand() -> None:
    """W = diag(2, 1), ranks 1 and 2, epsilon 1: e = (1, 0), p* = (1/2, 1) / (3/2) = (1/3, 2/3), no softmax.

    Client 1 was sent diag(2, 0) and returns diag(5, 0); client 2 was sent W and returns diag(2, 4):
    diag(2, 1) + 1/3 diag(3, 0) + 2/3 diag(0, 3) = diag(3, 3).
    """
    returned = [outer([5.0, 0.0], [1.0, 0.0]), diag(2.0, 4.0)]
    given = by_hand(FedHL(epsilon=1.0, temperature=None), returned, [1, 9], torch.tensor([2.0, 1.0]))
    np.testing.assert_allclose(given, np.diag([3.0, 3.0]), atol=1e-5)


def weights_of(rule: FedHL, samples: Sequence[int] = (1, 3), **modules: LowRank) -> list[float]:
    """The shares of a client of rank 1 and one of rank 2, were these the modules of W_t."""
    clients = [Client("small", samples[0], 1), Client("large", samples[1], 2)]
    state = rule.init(model(modules, {name: W.shape for name, W in modules.items()}), clients)
    shares = rule.shares(state, asked(rule, state, clients, unmoved))
    return [shares["small"], shares["large"]]


LN2, ROOT = math.log(2), math.exp(1 / 3)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        # W = diag(3, 2), e = (2, 0), epsilon 1
        (FedHL(epsilon=1.0, temperature=None), [1 / 6, 5 / 6]),  # 1 / (4 + 1) : 1 / 1
        (FedHL(epsilon=1.0, temperature=None, truncation_error="squared_norm"), [1 / 18, 17 / 18]),  # 1 / (16 + 1) : 1
        (FedHL(epsilon=4.0, temperature=None), [1 / 3, 2 / 3]),  # 1 / (4 + 4) : 1 / 4
        (FedHL(epsilon=4.0, temperature=1.0), [1 / (1 + ROOT), ROOT / (1 + ROOT)]),  # e^(1/3) : e^(2/3)
        (FedHL(epsilon=4.0, temperature=1 / (6 * LN2)), [1 / 5, 4 / 5]),  # 2^2 : 2^4
        (FedHL(weights="fedavg"), [1 / 4, 3 / 4]),  # 1 : 3 rows
        (FedHL(weights="rank"), [1 / 3, 2 / 3]),  # ranks 1 : 2
        (FedHL(), [1 / (1 + math.e), math.e / (1 + math.e)]),  # epsilon 1e-6: p* is (2.5e-7, 1) but for rounding
        (FedHL(epsilon=5e-324, temperature=None), [0, 1]),  # 1 / epsilon would be infinite
    ],
    ids=str,
)
def test_fedhl_s_weights_by_hand(rule: FedHL, wanted: list[float]) -> None:
    assert weights_of(rule, w=diag(3.0, 2.0)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("key", ["epsilon", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_fedhl_s_constants_turn_no_weight_round(key: str, value: float) -> None:
    """Built without a recipe too: a negative one would give the most weight to who lost the most."""
    with pytest.raises(FedError, match=f"^{key}={value}: give a finite number above 0"):
        FedHL(**{key: value})  # type: ignore[arg-type]


def test_fedhl_s_weights_are_uniform_where_nothing_is_cut() -> None:
    """W = 0 and W of rank 1: every e_i is 0, so the counts (1 and 99 rows) do not matter."""
    for W in (LowRank.zeros(2, 2), outer([1.0, 2.0], [3.0, 4.0])):
        for rule in (FedHL(), FedHL(temperature=None), FedHL(weights_per="module", temperature=None)):
            assert weights_of(rule, (1, 99), w=W) == pytest.approx([0.5, 0.5], rel=1e-6)


def test_fedhl_s_weights_over_two_modules_by_hand() -> None:
    """a = diag(3, 2) with e = 2 and b = diag(3, 1) with e = 1; epsilon 1.

    For the model e^2 = 4 + 1 = 5: p = (1/6, 1) / (7/6) = (1/7, 6/7). Per module: a: (1/5, 1) -> (1/6, 5/6),
    b: (1/2, 1) -> (1/3, 2/3); the mean of both is (1/4, 3/4).
    """
    modules = {"a": diag(3.0, 2.0), "b": diag(3.0, 1.0)}
    rule = FedHL(epsilon=1.0, temperature=None)
    assert weights_of(rule, **modules) == pytest.approx([1 / 7, 6 / 7], rel=1e-5)
    assert weights_of(replace(rule, weights_per="module"), **modules) == pytest.approx([1 / 4, 3 / 4], rel=1e-5)


def test_each_module_moves_by_its_own_weights() -> None:
    """As above; client 1 alone moves, by diag(42, 0): 42/7 = 6 for the model, 42/6 = 7 and 42/3 = 14 per module."""
    modules = {"a": diag(3.0, 2.0), "b": diag(3.0, 1.0)}
    clients = [Client("small", 1, 1), Client("large", 1, 2)]
    step = outer([45.0, 0.0], [1.0, 0.0])  # diag(3, 0), as sent, + diag(42, 0)
    for per, a, b in [("model", 6.0, 6.0), ("module", 7.0, 14.0)]:
        rule = FedHL(epsilon=1.0, temperature=None, weights_per=per)  # type: ignore[arg-type]
        state = rule.init(model(modules, {name: (2, 2) for name in modules}), clients)
        replies = asked(rule, state, clients, lambda c, n, s: step if c.id == "small" else s)
        after = served(rule, rule.aggregate(state, replies, ROUND))
        np.testing.assert_allclose(after["a"], np.diag([3 + a, 2.0]), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(after["b"], np.diag([3 + b, 1.0]), rtol=1e-5, atol=1e-5)
