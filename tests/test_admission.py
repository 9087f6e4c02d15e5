"""What may touch the state: a reply is admitted whole, or refused with a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedllm.algorithms import LOW_RANK
from fedllm.core import Client, Model, Reply, Round, Tensors, under
from fedllm.lowrank import LowRank
from fedllm.server.admission import admit

NAN, INF = float("nan"), float("inf")


def product(rank: int = 2, value: float = 1.0, d_out: int = 4, d_in: int = 3) -> LowRank:
    return LowRank(torch.full((d_out, rank), value), torch.ones(rank, d_in))


def reply(id: str = "c1", **returned: object) -> Reply:
    """A client of rank 2 that was sent a product and a tensor, and returns good ones but for what is given."""
    sent: Tensors = {"q": product(value=0.0), "conv": torch.zeros(2, 2)}
    good: dict[str, object] = {"q": product(), "conv": torch.ones(2, 2)}
    kept = {name: value for name, value in (good | returned).items() if value is not None}
    return Reply(Client(id, 10, 2), sent, kept)  # type: ignore[arg-type]


def test_good_replies_pass_in_their_order() -> None:
    replies = [reply("b"), reply("a"), reply("c")]
    admitted, refused = admit(replies)
    assert admitted == replies and refused == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_floating_dtype_passes(dtype: torch.dtype) -> None:
    B, A = product().B.to(dtype), product().A.to(dtype)
    assert admit([reply(q=LowRank(B, A), conv=torch.ones(2, 2, dtype=dtype))])[1] == {}


BAD: list[tuple[str, object, str]] = [
    ("q", None, "q is missing"),
    ("extra", product(), "extra is returned and never sent"),
    ("q", product(d_out=5), "q has the shape (5, 3), and (4, 3) was expected"),
    ("q", product(rank=1), "q has rank 1, and rank 2 was expected"),
    ("q", product(rank=3), "q has rank 3"),
    ("q", torch.ones(4, 3), "q is a Tensor, and a LowRank was expected"),
    ("q", "a string", "q is a str"),
    ("q", LowRank(torch.ones(4, 2, dtype=torch.int64), torch.ones(2, 3)), "q's B is torch.int64"),
    ("q", LowRank(torch.ones(4, 2).to(torch.float8_e5m2), torch.ones(2, 3)), "q's B is torch.float8_e5m2"),
    ("q", LowRank(torch.ones(4, 2, device="meta"), torch.ones(2, 3)), "dense, was expected"),
    ("conv", torch.ones(2, 2).to_sparse(), "dense, was expected"),
    ("q", product(value=NAN), "q's B holds 8 values that are NaN"),
    ("q", LowRank(torch.ones(4, 2), torch.tensor([[INF, 0, 0], [0, 0, 0]])), "q's A holds 1 values"),
    ("q", product(value=1e19), "q's B is so large"),
    ("q", LowRank(torch.full((4, 2), 1e12), torch.full((2, 3), 1e12)), "|B| |A|"),
    ("conv", torch.ones(2, 3), "conv has the shape (2, 3), and (2, 2) was expected"),
    ("conv", product(), "conv is a LowRank, and a Tensor was expected"),
    ("conv", torch.ones(2, 2, dtype=torch.bool), "conv is torch.bool"),
    ("conv", torch.tensor([[NAN, 1], [1, 1]]), "conv holds 1 values"),
    ("conv", torch.full((2, 2), 1e30), "conv is so large"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD, ids=[words for *_, words in BAD])
def test_a_bad_reply_is_refused_with_the_reason_and_alone(name: str, value: object, words: str) -> None:
    good = [reply("first"), reply("last")]
    admitted, refused = admit([good[0], reply("bad", **{name: value}), good[1]])
    assert admitted == good
    assert list(refused) == ["bad"] and words in refused["bad"] and refused["bad"].endswith(".")


def test_two_replies_of_one_id_are_both_refused() -> None:
    admitted, refused = admit([reply("twin"), reply("one"), reply("twin")])
    assert [r.client.id for r in admitted] == ["one"]
    assert refused == {"twin": "The id replied 2 times in one round."}


def test_nobody_is_admitted_from_nobody() -> None:
    assert admit([]) == ([], {})
    assert admit([reply(q=None)], norm_bound=2.0)[0] == []


def test_only_the_group_that_was_sent_to_be_trained_is_expected() -> None:
    """FLoRA's payload: the frozen sum so far, which nobody returns, and a fresh adapter."""
    sent = under("frozen", {"q": product(7)}) | under("adapter", {"q": product(2)})
    fine = Reply(Client("fine", 1, 2), sent, {"q": product(2)})
    whole = Reply(Client("whole", 1, 2), sent, sent)
    admitted, refused = admit([fine, whole])
    assert admitted == [fine] and list(refused) == ["whole"]


def test_what_is_expected_can_be_described_by_the_caller() -> None:
    nested = Reply(Client("c", 1, 2), {"q": product()}, {"q.down": torch.ones(4, 2)})
    assert list(admit([nested])[1]) == ["c"]
    assert admit([nested], lambda reply: {"q.down": torch.zeros(4, 2)})[1] == {}


def test_counters_keep_their_dtype() -> None:
    """A batch norm counts its batches in int64; that is no update, and no reason to refuse one."""
    counted = Reply(Client("c", 1), {"n": torch.tensor(0)}, {"n": torch.tensor(5)})
    assert admit([counted])[1] == {}
    assert "int64" in admit([replace(counted, returned={"n": torch.tensor(5.0)})])[1]["c"]


def moving(id: str, distance: float) -> Reply:
    """A reply whose update is ``distance`` in one entry of a matrix."""
    sent = {"q": LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]))}
    return Reply(
        Client(id, 1, 1), sent, {"q": LowRank(torch.tensor([[1.0 + distance], [0.0]]), torch.tensor([[1.0, 0.0]]))}
    )


@pytest.mark.parametrize(
    ("distances", "bound", "out"),
    [
        ([1, 2, 3], 1.6, []),  # the median is 2, and 3 <= 1.6 * 2
        ([1, 2, 3], 1.4, ["2"]),  # 3 > 1.4 * 2
        ([1, 1, 1000, 1000], 10.0, ["2", "3"]),  # half of them are bad: the low median is still 1
        ([0, 0, 5], 2.0, []),  # a median of 0 is no unit
        ([7], 1.0, []),  # alone, a client is its own median
        ([1, 2, 3], None, []),
    ],
)
def test_the_norm_bound_is_relative_to_the_cohort(distances: list[float], bound: float | None, out: list[str]) -> None:
    replies = [moving(str(i), distance) for i, distance in enumerate(distances)]
    admitted, refused = admit(replies, norm_bound=bound)
    assert sorted(refused) == out
    assert len(admitted) + len(refused) == len(replies)
    for reason in refused.values():
        assert "times the cohort's median" in reason


def test_a_refused_reply_does_not_move_the_median() -> None:
    """Without the NaN the median of 1, 1, 3 is 1; with its norm counted it would not be a number."""
    broken = replace(moving("nan", 1.0), returned={"q": LowRank(torch.full((2, 1), NAN), torch.ones(1, 2))})
    _, refused = admit([moving("a", 1), broken, moving("b", 1), moving("c", 3)], norm_bound=2.0)
    assert sorted(refused) == ["c", "nan"]


@pytest.mark.parametrize("rule", LOW_RANK)
def test_every_rule_s_own_download_is_admitted_when_trained(rule: str) -> None:
    """A client that returns what it was sent to train, moved a little, is admitted under every rule of the table."""
    algorithm = LOW_RANK[rule]()
    clients = [Client("a", 1, 2), Client("b", 2, 2)]
    state = algorithm.init(Model({"q": torch.empty(4, 3, device="meta")}), clients)
    for rnd in (Round(1, 0), Round(2, 0)):
        replies = []
        for client in clients:
            sent = algorithm.download(state, client, rnd)
            starts = algorithm.expected(Reply(client, sent, {}))
            returned = {n: LowRank(M.B + 0.1, M.A) if isinstance(M, LowRank) else M + 0.1 for n, M in starts.items()}
            replies.append(Reply(client, sent, returned))
        admitted, refused = admit(replies, algorithm.expected, norm_bound=10.0)
        assert refused == {}
        state = algorithm.aggregate(state, admitted, rnd)
