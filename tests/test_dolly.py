"""Dolly: context in the prompt, Rouge-L by category, the real rows, and the recipe of the paper's setting."""

from collections import Counter

import pytest

from fedllm.config.rank_profiles import PROFILES
from fedllm.recipe.page import load
from fedllm.tasks.dolly import Dolly

ROW = {"instruction": "Who?", "context": "It was Ann.", "response": "Ann", "category": "closed_qa"}


def test_the_context_is_the_input():
    assert "### Input:\nIt was Ann.\n\n### Response:\n" in Dolly().prompt(ROW)
    assert "### Input" not in Dolly().prompt(ROW | {"context": ""})
    assert Dolly().target(ROW) == "Ann"


def test_scores_are_of_the_generated_text():
    task = Dolly()
    scores = task.score_all(["Ann", "Bob"], [ROW, ROW])
    assert scores == [{"rouge_l": 1.0}, {"rouge_l": 0.0}]
    assert task.summary(scores) == {"rouge_l": 0.5}


@pytest.fixture
def dolly(data_dir):
    return str(data_dir / "dolly" / "databricks-dolly-15k.jsonl")


def test_the_real_rows(dolly):
    everything = Dolly(held_out=0).load(dolly, "train")
    assert len(everything) == Dolly(held_out=0).rows["train"] == 15011
    assert Counter(row["category"] for row in everything)["open_qa"] == 3742
    task = Dolly()
    train, test = task.load(dolly, "train"), task.load(dolly, "test")
    assert {"train": len(train), "test": len(test)} == task.rows
    assert len({row["category"] for row in test}) == 8  # a score for every category
    full = task.summary(task.score_all([task.target(row) for row in test], test))
    assert full["rouge_l"] == 1.0


def test_the_recipe_and_its_hundred_clients(dolly):
    recipe = load(["recipe=fedhl_dolly"])
    assert (recipe.run.rounds, recipe.worker.epochs, recipe.worker.weight_decay) == (5, 2, 0.001)
    assert recipe.data.partition.column == "category" and recipe.data.partition.eta == 0.3
    header = recipe_header("fedhl_dolly")
    many = load(["recipe=fedhl_dolly", *header])
    ranks = many.clients.ranks()
    assert len(ranks) == 100 and sum(ranks) == 10 * sum(PROFILES["high"])
    assert (many.clients.participation, many.run.rounds) == (0.15, 15)
    rows = many.data.task.load(dolly, "train")
    members = [type("Member", (), {"id": f"c{i}", "rank": rank})() for i, rank in enumerate(ranks)]
    parts = many.data.partition.split([row["category"] for row in rows], len(rows), members, 0)
    assert sum(map(len, parts)) == len(rows) and len(parts[0]) > 10 * len(parts[-1])  # rank 64 against 4


def recipe_header(name: str) -> list[str]:
    """The overrides that a page's header names for its other setting."""
    from fedllm.recipe.page import find

    lines = [line[1:].split() for line in find(name).read_text().splitlines() if line.startswith("#   ")]
    return [word for words in lines for word in words if "=" in word and not word.startswith("eval.")]
