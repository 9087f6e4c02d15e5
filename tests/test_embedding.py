"""Maps of what clients' networks see: whose network sees which examples, through a run and its checkpoint."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedllm import cli, train
from fedllm.algorithms import ALGORITHMS
from fedllm.commands.tsne import Point, laid_out, network_of, picture, points_of, thinned
from fedllm.core import Client, Model, Round
from fedllm.errors import FedError
from fedllm.federation.build import build_federation
from fedllm.models.build import drawn
from fedllm.models.network import Network
from fedllm.recipe import page as recipe
from fedllm.storage import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clients of two classes each with five kinds of networks, of whom six were drawn in the one round."""
    out = tmp_path_factory.mktemp("tsne") / "run"
    asked = ["recipe=vision_smoke", "algorithm.name=lg_fedavg", "model.name=cnn5", "clients.levels=[]"]
    asked += ["model.own=[cnn1,cnn2,cnn3,cnn4,cnn5]", "clients.count=10", "clients.participation=0.6", "run.rounds=1"]
    asked += ["data.train_rows=200", "data.test_rows=100", "data.partition={name: two_level, classes: 2}"]
    assert train.main([*asked, f"run.output={out}", "run.threads=1", "worker.score=clients", "eval.base=false"]) == 0
    return out


def test_every_client_that_was_drawn_sees_its_own_test_examples(run: Path) -> None:
    points = points_of(run)
    trained = set(json.loads((run / "rounds.jsonl").read_text())["clients"])
    assert len(trained) == 6 and {point.client for point in points} == trained
    split = json.loads((run / "partition.json").read_text())["clients"]
    for id in trained:
        labels = {str(point.label) for point in points if point.client == id}
        assert labels and labels <= set(split[id]["labels"]) and len(labels) <= 2


def test_it_sees_them_through_its_own_layers_and_the_head_that_is_served(run: Path) -> None:
    asked = recipe.load([f"recipe={run / 'recipe.yaml'}"])
    done = checkpoint.load(run / "checkpoint", asked.page)
    assert done is not None
    federation = build_federation(asked)
    worker = federation.worker(lambda loss: None)
    client = next(client for client in federation.clients if client.id in done.memories)
    weights = network_of(asked.algorithm, client, done.state, done.memories[client.id], Round(1, 0))
    assert torch.equal(weights["head.fc.weight"], done.state["head.fc.weight"])
    assert torch.equal(weights["convs.0.weight"], done.memories[client.id]["convs.0.weight"])
    net = worker.fitted(weights, None, worker.of(client).model.make).eval()
    x, y = worker.task.test_batch(worker.test_set, worker.test_parts[client.id])
    with torch.no_grad():
        wanted = net.features(x).representation
    points = [point for point in points_of(run) if point.client == client.id]
    np.testing.assert_allclose(np.stack([p.representation for p in points]), wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert [point.label for point in points] == y.tolist()


@pytest.mark.parametrize("name", ["fedavg", "heterofl"])
def test_where_networks_are_shared_a_client_uses_what_it_is_sent(name: str) -> None:
    make = Network(name="cnn1").maker("plain", 10)
    draw = lambda described: drawn(described, Round(0, 3).rng("initial"))  # noqa: E731
    model = Model(draw(make()), anatomy=make().anatomy(), make=make, draw=draw)
    client, rule = Client("a", 4, width=0.5, depth=2, level="b2"), ALGORITHMS[name]()
    state = rule.init(model, [client])
    sent = rule.download(state, client, Round(1, 0))
    used = network_of(rule, client, state, {}, Round(1, 0))
    assert {key: W.shape for key, W in used.items()} == {key: W.shape for key, W in sent.items()}


def test_the_command_writes_a_map_and_its_numbers_and_the_report_shows_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tsne", str(run), "--examples", "40"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.md")
    rows = list(csv.DictReader((run / "plots/tsne.csv").open()))
    assert len(rows) == 40 and all(np.isfinite([float(row["x"]), float(row["y"])]).all() for row in rows)
    assert (run / "plots/tsne.png").read_bytes().startswith(b"\x89PNG")
    assert "(plots/tsne.png)" in (run / "report.md").read_text()


def blobs(n: int, clients: int) -> list[Point]:
    """Two classes, 20 apart in eight dimensions."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(20 * (i % 2), 1, 8).astype(np.float32) for i in range(n)]
    return [Point(f"c{i % clients}", i % 2, row) for i, row in enumerate(rows)]


def test_what_lies_far_apart_is_laid_out_far_apart() -> None:
    points = blobs(40, 4)
    places = laid_out(points, seed=0)
    centres = [places[label::2].mean(axis=0) for label in (0, 1)]
    spread = max(np.linalg.norm(places[label::2] - centres[label], axis=1).max() for label in (0, 1))
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread
    assert np.array_equal(places, laid_out(points, seed=0))


@pytest.mark.parametrize(("clients", "markers"), [(4, 4), (12, 1)])
def test_few_clients_have_markers_of_their_own(clients: int, markers: int) -> None:
    points = blobs(48, clients)
    (ax,) = picture(points, np.zeros((48, 2), dtype=np.float32)).axes
    shapes = {tuple(map(tuple, drawn.get_paths()[0].vertices)) for drawn in ax.collections}
    assert len(ax.collections) == clients and len(shapes) == markers
    told = [text.get_text() for text in ax.get_legend().get_texts()]
    assert told == ["class 0", "class 1", *([f"c{i}" for i in range(4)] if clients == 4 else [])]


def test_a_sample_is_even_over_clients() -> None:
    assert [point.client for point in thinned(blobs(9, 9), 3)] == ["c0", "c4", "c8"]
    assert len(thinned(blobs(9, 9), 10)) == 9


def test_what_makes_no_map_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FedError, match="no run's folder"):
        points_of(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.dump(recipe.load(["recipe=smoke"])))
    with pytest.raises(FedError, match="worker.name=vision"):
        points_of(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.dump(recipe.load(["recipe=vision_smoke"])))
    with pytest.raises(FedError, match="no finished round"):
        points_of(tmp_path)
    with pytest.raises(FedError, match="differ in length"):
        laid_out([*blobs(8, 2), Point("c9", 0, np.zeros(3, dtype=np.float32))], seed=0)
    with pytest.raises(FedError, match="4 at least"):
        laid_out(blobs(3, 1), seed=0)
