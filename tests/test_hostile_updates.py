"""One liar of four against rules of the table: it is refused, remarked on, or it does not matter."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fedllm.core import Client, Reply
from fedllm.lowrank import LowRank
from fedllm.server.admission import admit, told, unreadable

_spec = importlib.util.spec_from_file_location(
    "benchmark_of_admission", Path(__file__).parents[1] / "benchmarks/admission.py"
)
assert _spec is not None and _spec.loader is not None
attack = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attack)

FAST = [
    "regauged 1e+06",
    "regauged 1e+15",
    "dtype float8_e5m2",
    "dtype complex64",
    "metric nan",
    "graph",
    "dtype float64",
]


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("rule", ["fedit", "flexlora", "mfedloru"])
def test_no_reply_moves_the_model_by_three_honest_rounds_in_silence(rule: str, kind: str) -> None:
    found = attack.attacked(rule, kind)
    assert found.ended == "" and (found.noticed or found.moved < 3 and not found.broken)


@pytest.mark.slow
@pytest.mark.parametrize("rule", attack.RULES)
def test_none_of_all_kinds_moves_the_model_in_silence(rule: str) -> None:
    assert len(attack.KINDS) >= 61
    results = {kind: attack.attacked(rule, kind) for kind in attack.KINDS}
    assert [kind for kind, found in results.items() if found.silent or found.ended] == []


def product(scale: float = 1.0, gauge: float = 1.0) -> LowRank:
    return LowRank(torch.full((4, 2), 0.1 * scale * gauge), torch.ones(2, 3) / gauge)


def reply(id: str, M: LowRank) -> Reply:
    return Reply(Client(id, 1, 2), {"q": LowRank(torch.zeros(4, 2), torch.ones(2, 3) * 0.9)}, {"q": M})


@pytest.mark.parametrize("sent_known", [True, False])
def test_regauged_factors_are_refused_where_factors_are_averaged_alone(sent_known: bool) -> None:
    replies = [reply("a", product()), reply("evil", product(gauge=1e6)), reply("b", product(1.5))]
    assert admit(replies)[1] == {}
    admitted, refused = admit(replies, factors=lambda each: each.returned, sent_known=sent_known)
    assert [each.client.id for each in admitted] == ["a", "b"] and list(refused) == ["evil"]
    assert "averages factors" in refused["evil"]


def test_what_was_sent_bounds_a_factor_where_there_is_no_cohort() -> None:
    evil = reply("evil", product(gauge=1e6))
    assert list(admit([evil], factors=lambda each: each.returned)[1]) == ["evil"]
    assert admit([evil], factors=lambda each: each.returned, sent_known=False)[1] == {}
    assert admit([reply("good", product(50.0))], factors=lambda each: each.returned)[1] == {}


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"train_loss": float("nan")}, "train_loss is not finite"),
        ({"train_loss": 1e308}, "not finite, or so large"),
        ({"seconds": -1.0}, "below 0"),
        ({"steps": "3"}, "is a str"),
        ({"steps": True}, "is a bool"),
        ({"flops": None}, "is a NoneType"),
        ({3: 1.0}, "has a int for a name"),
        ([1.0], "metrics are a list"),
    ],
)
def test_metrics_that_are_no_finite_numbers_are_refused(metrics: object, words: str) -> None:
    assert words in str(unreadable(metrics))


def test_what_the_server_knows_is_not_a_client_s_to_say() -> None:
    metrics = {"train_loss": 1.0, "rank": 64, "rows": 10**18, "digest": 1, "own_accuracy": 0.5, "bytes_up": 0}
    assert unreadable(metrics) is None and told(metrics) == {"train_loss": 1.0, "own_accuracy": 0.5}
