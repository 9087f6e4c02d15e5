"""What small runs show of the papers' orderings: rules for clients of mixed capacity, and ProgFed's stages."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import pytest

from fedllm import compare, sweep
from fedllm.algorithms.progfed import ProgFed
from fedllm.cli import main

FULL, TWO, ONE = "HeteroFL 1, .75, .5", "HeteroFL .75, .5", "HeteroFL .5"


@pytest.mark.slow
def test_low_rank_networks_against_parts_of_networks(tmp_path: Path) -> None:
    """One seed of the page ``vision_capacities``: FedLMT beside every mix of HeteroFL, and beside FedAvg."""
    page = sweep.load("vision_capacities", ["run.threads=1"], tmp_path / "runs")
    wanted = {"FedAvg", "FedLMT", FULL, TWO, ONE}
    runs = [run for run in page.runs if run.labels["rule"] in wanted and run.recipe.run.seed == 0]
    sweep.folder_of(page)
    assert sweep.execute(page, runs, 1, []) == []
    entries, _ = compare.entries_of([page.output])
    points = {entry.method: 100 * entry.final["accuracy"] for entry in entries}
    assert points.keys() == wanted
    assert points["FedLMT"] >= max(points[FULL], points[TWO], points[ONE])
    assert points[ONE] < points[FULL] - 20
    assert points["FedAvg"] >= points["FedLMT"] - 1


@pytest.mark.slow
def test_progfed_falls_when_it_grows_and_recovers(tmp_path: Path) -> None:
    """Three fresh heads in the first half of the run: each costs accuracy within two rounds, which comes back."""
    rounds = 48
    keys = [f"run.rounds={rounds}", "run.threads=1", f"run.output={tmp_path / 'run'}", "algorithm.name=progfed",
            "model={name: resnet18, widths: [8, 16, 32, 64]}", "data.sigma=0.7", "data.train_rows=2000",
            "data.partition.name=iid", "clients={count: 4, participation: 0.5}", "eval.every=1"]  # fmt: skip
    assert main(["train", "recipe=toy_capacities", *keys]) == 0
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    accuracy = [json.loads(line)["eval"]["accuracy"] for line in lines]
    *grows, last = accumulate(ProgFed().phases(rounds))
    assert last == rounds and len(grows) == 3
    for end in grows:  # the stage's last round is accuracy[end - 1]; the standard error of 1000 images is 1.6 points
        assert min(accuracy[end : end + 2]) < accuracy[end - 1] - 0.02
    assert accuracy[-1] > max(accuracy[end - 1] for end in grows)
