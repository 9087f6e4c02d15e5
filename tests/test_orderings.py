"""What small runs show of the papers' orderings: mixed capacity, networks of their own, many clients, stages."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import pytest

from fedllm.algorithms.networks.progfed import ProgFed
from fedllm.cli import main
from fedllm.commands import sweep
from fedllm.reports.compare.runs import entries_of

FULL, TWO, ONE = "HeteroFL 1, .75, .5", "HeteroFL .75, .5", "HeteroFL .5"


def ended(name: str, wanted: set[str], metric: str, folder: Path) -> dict[str, float]:
    """Points of these rules of a sweep's page after the last round, at seed 0; by rule, and setting if it has any."""
    page = sweep.load(name, ["run.threads=1"], folder)
    runs = [run for run in page.runs if run.labels["rule"] in wanted and run.recipe.run.seed == 0]
    sweep.folder_of(page)
    assert sweep.execute(page, runs, 1, []) == []
    entries, _ = entries_of([page.output])
    assert {entry.method for entry in entries} == wanted
    return {f"{entry.method} {entry.setting}".strip(): 100 * entry.final[metric] for entry in entries}


@pytest.mark.slow
def test_low_rank_networks_against_parts_of_networks(tmp_path: Path) -> None:
    """FedLMT beside every mix of HeteroFL, and beside FedAvg."""
    points = ended("vision_capacities", {"FedAvg", "FedLMT", FULL, TWO, ONE}, "accuracy", tmp_path)
    assert points["FedLMT"] >= max(points[FULL], points[TWO], points[ONE])
    assert points[ONE] < points[FULL] - 20
    assert points["FedAvg"] >= points["FedLMT"] - 1


@pytest.mark.slow
def test_clients_own_networks_converge_alike(tmp_path: Path) -> None:
    """At 120 rounds a shared adapter neither costs nor gains a client much, and mutual learning gains it nothing."""
    points = ended("private_toy", {"standalone", "fedlora .7", "fedproto", "fml"}, "own_accuracy", tmp_path)
    assert abs(points["fedlora .7"] - points["standalone"]) <= 3
    assert points["fml"] <= points["standalone"] + 1
    assert min(points.values()) > 90


@pytest.mark.slow
def test_low_rank_updates_overtake_with_the_number_of_clients(tmp_path: Path) -> None:
    """The same images with 8 clients and with 200: FedAvg is ahead with few, FedLoRU by far with many."""
    points = ended("fedloru_many_clients", {"fedloru", "fedavg"}, "accuracy", tmp_path)
    assert points["fedavg 8"] > points["fedloru 8"]
    assert points["fedloru 200"] > points["fedavg 200"] + 10


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
