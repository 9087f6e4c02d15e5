"""The pages in docs/ do what they say: their code is run as a reader would run it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm import train
from fedllm.algorithms import ALGORITHMS
from fedllm.core import Round
from fedllm.lowrank import LowRank, fill
from fedllm.recipe import page as recipe
from fedllm.storage import checkpoint

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_an_algorithm.md").read_text()


def block(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n```python\n(.*?)```\n<!-- /{mark} -->", PAGE, re.DOTALL)
    assert found, mark
    return found[1]


@pytest.fixture
def page() -> dict[str, Any]:
    """The names that the page's two files define."""
    module: dict[str, Any] = {"__name__": "ffa_lora"}
    for mark in ("rule", "test"):
        exec(compile(block(mark), f"docs/adding_an_algorithm.md, {mark}", "exec", dont_inherit=True), module)
    return module


def test_the_page_s_own_test_passes(page: dict[str, Any]) -> None:
    tests = [value for name, value in page.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


def test_the_page_s_rule_runs_from_a_recipe(
    page: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two rounds A has, to the bit, the values that the seed gave it, B has been trained, and only B came up."""
    monkeypatch.setitem(ALGORITHMS, "ffa_lora", page["FFALoRA"])
    asked = ["recipe=smoke", "algorithm.name=ffa_lora", "clients.rank=4", "clients.count=2", "run.rounds=2"]
    asked += [f"run.output={tmp_path / 'run'}", "run.threads=1"]
    assert train.main(asked) == 0
    done = checkpoint.load(tmp_path / "run" / "checkpoint", recipe.load([*asked, "run.resume=true"]).page)
    assert done is not None and done.state
    for name, W in done.state.items():
        assert isinstance(W, LowRank) and bool(W.B.any())
        drawn = fill(LowRank.zeros(*W.shape), 4, Round(1, recipe.load(asked).run.seed).rng("fresh", name)).A
        assert torch.equal(W.A, drawn), name
    records = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(record["bytes_up"] < record["bytes_down"] for record in records)


def test_files_that_the_pages_name_exist() -> None:
    for path in re.findall(r"`((?:fedllm|tests|docs|recipes)/[\w/]+\.\w+)`", PAGE):
        assert path.endswith("ffa_lora.py") or (ROOT / path).is_file(), path  # but for the two that the reader writes
