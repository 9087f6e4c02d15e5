"""Guards: what a minority may do to an average of updates, for any rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.algorithms import ALGORITHMS, LOW_RANK
from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.server.admission import admit, moved
from fedllm.server.robust import ROBUST, Clip, Krum, Median, TrimmedMean, Trust

RULES = {
    name: kind() for name, kind in ALGORITHMS.items() if name in {"fedit", "zero_padding", "flexlora", "flora", "fedhl"}
}
SHAPES = {"q": (7, 5), "v": (6, 8)}
RND = Round(2, 0)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start(rule: Algorithm, ranks: list[int]) -> tuple[Tensors, list[Client]]:
    """A rule's state after somebody has learned something, and its clients."""
    clients = [Client(f"c{i}", 10, rank) for i, rank in enumerate(ranks)]
    update = {name: LowRank(randn(d_out, 3, seed=1), randn(3, d_in, seed=2)) for name, (d_out, d_in) in SHAPES.items()}
    model = Model({name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}, update)
    return rule.init(model, clients), clients


def trained(rule: Algorithm, state: Tensors, client: Client, step: float, seed: int) -> Reply:
    """A client that moved both factors of what it was to train."""
    sent = rule.download(state, client, RND)
    blank = Reply(client, sent, {})
    returned = {
        name: LowRank(W.B + step * randn(*W.B.shape, seed=seed), W.A + step * randn(*W.A.shape, seed=seed + 1))
        for name, W in rule.expected(blank).items()
    }
    return Reply(client, sent, returned)


def cohort(rule: Algorithm, liars: int, honest: int = 5, size: float = 1e3) -> tuple[Tensors, list[Reply]]:
    """Honest clients that moved nearly alike, and liars that moved ``size`` times as far, all in one direction.

    One rank for the rules that average factors: with mixed ones zero-padding alone is far from any single client.
    """
    rank = [4] * (honest + liars) if not rule.any_rank else [4, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3][: honest + liars]
    state, clients = start(rule, rank)
    replies = [trained(rule, state, client, 0.01, seed=10 + i) for i, client in enumerate(clients[:honest])]
    return state, replies + [trained(rule, state, client, 0.01 * size, seed=99) for client in clients[honest:]]


def served(rule: Algorithm, state: Tensors, replies: list[Reply]) -> dict[str, torch.Tensor]:
    after = rule.served(rule.aggregate(state, replies, RND))
    return {name: W.dense() if isinstance(W, LowRank) else W for name, W in after.items()}


def apart(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("guard", [Clip(2.0), Krum(), Krum(keep=3), Median(), TrimmedMean(0.3)])
def test_two_liars_among_seven_hardly_move_any_rule(rule: str, guard: Trust) -> None:
    """Without a guard they carry it off: a hundred times as far from the honest average as with one."""
    algorithm = RULES[rule]
    state, replies = cohort(algorithm, liars=2)
    honest = served(algorithm, state, replies[:5])
    kept, _ = guard.guard(algorithm, replies)
    guarded = apart(served(algorithm, state, kept), honest)
    assert guarded < 0.01 * apart(served(algorithm, state, replies), honest)
    assert guarded < 3.0  # the honest ones are some tenths apart


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("guard", [Clip(2.0), Krum(keep=4), Median(), TrimmedMean(0.25)])
def test_identical_clients_are_averaged_as_without_a_guard(rule: str, guard: Trust) -> None:
    """Equal updates have one median, no outlier and no preferred one. Rank 5 so that every product is held whole."""
    algorithm = RULES[rule]
    state, clients = start(algorithm, [5, 5, 5, 5])
    replies = [trained(algorithm, state, client, 0.05, seed=3) for client in clients]
    kept, _ = guard.guard(algorithm, replies)
    assert apart(served(algorithm, state, kept), served(algorithm, state, replies)) < 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_what_a_guard_returns_is_admissible_and_nothing_given_is_changed(rule: str) -> None:
    algorithm = RULES[rule]
    state, replies = cohort(algorithm, liars=1)
    before = [{name: (W.B.clone(), W.A.clone()) for name, W in reply.returned.items()} for reply in replies]
    for guard in (Trust(), Clip(1.0), Krum(), Median(), TrimmedMean()):
        kept, notes = guard.guard(algorithm, replies)
        assert {reply.client.id for reply in kept} | set(notes) <= {reply.client.id for reply in replies}
        for reply in kept:
            for name, W in algorithm.expected(reply).items():
                assert reply.returned[name].shape == W.shape
                assert algorithm.any_rank or reply.returned[name].rank <= W.rank
    for reply, values in zip(replies, before, strict=True):
        for name, (B, A) in values.items():
            assert torch.equal(reply.returned[name].B, B) and torch.equal(reply.returned[name].A, A)


def one(value: float, id: str = "a", shape: tuple[int, ...] = ()) -> Reply:
    """A client that was sent zeros, as a product and as a tensor, and returns this in every entry of both."""
    sent: Any = {"q": LowRank(torch.zeros(2, 1), torch.ones(1, 2)), "w": torch.zeros(shape)}
    return Reply(
        Client(id, 1, 1),
        sent,
        {"q": LowRank(torch.full((2, 1), float(value)), torch.ones(1, 2)), "w": torch.full(shape, float(value))},
    )


class AnyRank(Algorithm):
    any_rank = True


def values(kept: list[Reply]) -> list[list[float]]:
    return [[round(float(r.returned["q"].dense().mean()), 4), round(float(r.returned["w"].mean()), 4)] for r in kept]


@pytest.mark.parametrize("rule", [Algorithm(), AnyRank()])
def test_medians_and_trimmed_means_by_hand(rule: Algorithm) -> None:
    """1 2 3 4 100: median 3; without one at each end (2 + 3 + 4) / 3; with all of them 22. Of 1 2 4 9: (2 + 4) / 2."""
    five = [one(x) for x in (4, 1, 100, 3, 2)]
    assert values(Median().guard(rule, five)[0]) == [[3.0, 3.0]] * 5
    assert values(TrimmedMean(0.2).guard(rule, five)[0]) == [[3.0, 3.0]] * 5
    assert values(TrimmedMean(0.0).guard(rule, five)[0]) == [[22.0, 22.0]] * 5
    assert values(Median().guard(rule, [one(x) for x in (1, 9, 4, 2)])[0]) == [[3.0, 3.0]] * 4
    assert values(TrimmedMean(0.49).guard(rule, [one(7)])[0]) == [[7.0, 7.0]]


def test_clipping_by_hand() -> None:
    """Norms of (1, 1, 5) times sqrt(4 + 1): the median is sqrt 5, twice that is 2 sqrt 5, and 5 becomes 2."""
    kept, notes = Clip(2.0).guard(Algorithm(), [one(1, "a"), one(-1, "b"), one(5, "c")])
    assert values(kept) == [[1, 1], [-1, -1], [2, 2]] and list(notes) == ["c"]
    assert notes["c"] == "clipped: its update's norm, 11.2, came down to 4.47"
    assert values(Clip(2.0).guard(Algorithm(), [one(0), one(0), one(5)])[0])[2] == [5, 5]  # no unit to compare with


def test_clipping_moves_both_factors_along_their_segment() -> None:
    """A product's distance along it is not linear: at the end it is what was allowed, to rounding."""
    algorithm = RULES["flexlora"]
    state, replies = cohort(algorithm, liars=1, size=30)
    kept, _ = Clip(1.5).guard(algorithm, replies)
    norms = [moved(reply.returned, algorithm.expected(reply)) for reply in replies]
    got = moved(kept[-1].returned, algorithm.expected(kept[-1]))
    assert got == pytest.approx(1.5 * sorted(norms)[2], rel=1e-5) and got < norms[-1] / 10
    assert kept[-1].returned["q"].rank == replies[-1].returned["q"].rank


def test_krum_by_hand() -> None:
    """0 1 2 10 11 with f = 1: their 2 nearest squares are 5, 2, 5, 1 + 64, 1 + 81, in units of the 4 + 1 entries."""
    replies = [one(x, str(x)) for x in (10, 0, 2, 11, 1)]
    kept, notes = Krum().guard(Algorithm(), replies)
    assert [reply.client.id for reply in kept] == ["1"] and set(notes) == {"0", "2", "10", "11"}
    assert notes["11"] == "left out by krum: its score is 410, the best one 10"
    assert [r.client.id for r in Krum(liars=1, keep=3).guard(Algorithm(), replies)[0]] == ["0", "2", "1"]
    assert len(Krum(liars=1, keep=9).guard(Algorithm(), replies)[0]) == 4  # n - f


def test_krum_says_how_many_it_needs() -> None:
    assert (Krum().least, Krum(liars=2).least, Median().least) == (3, 7, 1)
    with pytest.raises(FedError, match="7 replies or more are needed, and 5 came"):
        Krum(liars=2).guard(Algorithm(), [one(x) for x in range(5)])


def test_clients_of_different_parts_have_no_median() -> None:
    with pytest.raises(FedError, match="different parts of the model"):
        Median().guard(Algorithm(), [one(1, shape=(2,)), one(1, shape=(3,))])


@pytest.mark.parametrize("rule", RULES)
def test_breakdown_points(rule: str) -> None:
    """Up to the stated number of liars each guard stays near; one more, or a majority of them, and it does not."""
    algorithm = RULES[rule]
    cases = ((Median(), 4, True), (Median(), 6, False), (Krum(), 3, True), (Krum(liars=1), 1, True))
    for guard, many, holds in (*cases, (TrimmedMean(0.3), 2, True), (TrimmedMean(0.3), 4, False)):
        state, replies = cohort(algorithm, liars=many, honest=5)
        guarded = served(algorithm, state, guard.guard(algorithm, replies)[0])
        far = apart(guarded, served(algorithm, state, replies[:5]))
        assert (far < 5.0) is holds, (guard, many, far)


def test_the_table() -> None:
    assert set(ROBUST) == {"none", "clip", "krum", "median", "trimmed_mean"}


def stepped(value: Any, seed: int) -> Any:
    """The value, each of its factors moved a little."""
    if isinstance(value, LowRank):
        return LowRank(stepped(value.B, seed), stepped(value.A, seed + 1))
    return value + 0.01 * randn(*value.shape, seed=seed) if value.is_floating_point() else value


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("ranks", [[2, 4, 2, 3, 4], [4, 4, 4, 4, 4]], ids=["mixed", "alike"])
def test_every_rule_on_adapters_works_with_every_guard_or_is_refused_before_training(
    name: str, ranks: list[int]
) -> None:
    """Mixed ranks too, where the rule takes them: mFedLoRU's clients return products and matrices of one factor."""
    rule = LOW_RANK[name]()
    clients = [Client(f"c{i}", 10, rank) for i, rank in enumerate(ranks)]
    try:
        rule.validate(clients)
    except FedError:
        pytest.skip("the rule takes one rank alone")
    state, _ = start(rule, ranks)
    model = Model({name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()})
    replies = []
    for i, client in enumerate(clients):
        sent = rule.download(state, client, RND)
        returned = rule.expected(Reply(client, sent, {}))
        replies.append(Reply(client, sent, {key: stepped(value, 10 * i) for key, value in returned.items()}))
    for guard in (Clip(0.5), Krum(), Krum(keep=2), Median(), TrimmedMean(0.25)):
        try:
            guard.check(rule, model, clients, len(clients))
        except FedError as refusal:
            assert name == "fedalt" and guard.entrywise and "stays its own" in str(refusal)
            continue
        kept, _ = guard.guard(rule, replies)
        assert kept and (rule.any_rank or not admit(kept, rule.expected)[1])
        after = served(rule, state, kept)
        assert all(bool(torch.isfinite(W).all()) for W in after.values())


def test_median_of_matrices_and_products_in_one_place_by_hand() -> None:
    """mFedLoRU: two clients return B as B_d B_u, one as it is; entries 1, 2 and 9 have the median 2 for all three."""
    rule = ALGORITHMS["mfedloru"]()
    ones = torch.ones(4, 1)
    product = lambda x: LowRank(ones * x, torch.ones(1, 6))  # noqa: E731
    base = {"adapter/q": LowRank(torch.zeros(4, 6), torch.ones(6, 40)), "rank": torch.tensor(1)}

    def reply(id: str, B: Any, rank: int) -> Reply:
        A = torch.ones(6, 40) if rank == 6 else LowRank(torch.zeros(6, 1), torch.zeros(1, 40))
        return Reply(Client(id, 1, rank), base | {"rank": torch.tensor(rank)}, {"B/q": B, "A/q": A})

    replies = [reply("a", product(1.0), 1), reply("b", product(2.0), 1), reply("c", torch.full((4, 6), 9.0), 6)]
    kept, _ = Median().guard(rule, replies)
    for each in kept:
        M = rule.trained(each)["q"]
        torch.testing.assert_close(M.B, torch.full((4, 6), 2.0))
        torch.testing.assert_close(M.A, torch.ones(6, 40))
