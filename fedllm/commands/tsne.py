"""What clients' networks make of their test examples: representations, laid out in two dimensions by t-SNE.

``fedllm tsne RUN`` takes the clients' networks from the run's last checkpoint, each its own where the rule leaves it
one, and gives every one its own test examples. One colour at several places is a class that clients see
differently: networks that differ, and share little, have no reason to agree.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from fedllm.core import Algorithm, Client, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.federation.arrays import ArrayFederation
from fedllm.recipe import page as recipe
from fedllm.reports import report
from fedllm.reports.plots.style import GREY, panels, save, styled
from fedllm.storage import checkpoint, files

EXAMPLES = 1000
"""Points that a map shows well and t-SNE takes some seconds for."""

MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Point:
    """A test example as its client's network sees it."""

    client: str
    label: int
    representation: NDArray[np.float32]


def draw_map(run: Path, examples: int | None = None, seed: int = 0) -> Path:
    """Writes ``plots/tsne.png`` and ``plots/tsne.csv`` into the run's folder, and the report again; the report's path.

    Args:
        examples: at most, of all clients; ``EXAMPLES`` by default.
        seed: of the map.
    """
    points = thinned(points_of(run), examples or EXAMPLES)
    places = laid_out(points, seed)
    files.make_folder(run / "plots")
    table = io.StringIO()
    rows = [[p.client, p.label, *place] for p, place in zip(points, places.tolist(), strict=True)]
    csv.writer(table, lineterminator="\n").writerows([["client", "label", "x", "y"], *rows])
    files.write(run / "plots" / "tsne.csv", table.getvalue())
    with styled():
        save(picture(points, places), run / "plots" / "tsne.png")
    return report.write(run)


def points_of(run: Path) -> list[Point]:
    """Every client's test examples through the network that it would use now.

    Raises:
        FedError: no run of whole networks with classes, or no checkpoint of it.
    """
    if not (run / "recipe.yaml").is_file():
        raise FedError(f"{run} is no run's folder: it has no recipe.yaml. Give the folder that run.output named.")
    asked = recipe.load([f"recipe={run / 'recipe.yaml'}"])
    if not asked.worker.whole:
        raise FedError(f"{run} trained adapters of a language model: t-SNE is for runs of worker.name=vision.")
    done = checkpoint.load(run / "checkpoint", asked.page)
    if done is None or not done.index:
        raise FedError(f"{run / 'checkpoint'} holds no finished round: let the run finish one, then ask again.")
    federation = ArrayFederation(asked)
    worker, found = federation.worker(lambda loss: None), []
    for client in federation.clients:
        if done.memories and client.id not in done.memories:
            continue  # never drawn: it has no network of its own yet
        memory = done.memories.get(client.id, {})
        weights = network_of(asked.algorithm, client, done.state, memory, Round(done.index, asked.run.seed))
        for rows, y in worker.of(client).test_outputs(weights, representation):
            labels = y.tolist()
            found += [Point(client.id, *pair) for pair in zip(labels, rows.float().cpu().numpy(), strict=True)]
    if not found:
        raise FedError(f"{run}: no client has a network and test examples of its own.")
    return found


def network_of(rule: Algorithm, client: Client, state: Tensors, memory: Tensors, rnd: Round) -> Tensors:
    """What the client would use if it got the state and did not train."""
    sent = rule.download(state, client, rnd)
    return rule.personal(Reply(client, sent, sent), memory)


def representation(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.features(x).representation


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Evenly over all of them, so over clients and their classes."""
    if len(points) <= most:
        return list(points)
    return [points[round(place)] for place in np.linspace(0, len(points) - 1, most)]


def laid_out(points: Sequence[Point], seed: int) -> NDArray[np.float32]:
    """``(n, 2)``: van der Maaten and Hinton (2008), with perplexity 30, or as much as there are points for."""
    from sklearn.manifold import TSNE

    if len({len(point.representation) for point in points}) > 1:
        raise FedError("the clients' representations differ in length: there is no one space to lay them out in.")
    if len(points) < 4:
        raise FedError(f"{len(points)} test examples make no map: 4 at least.")
    perplexity = min(30.0, (len(points) - 1) / 3)
    rows = np.stack([point.representation for point in points])
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)


def picture(points: Sequence[Point], places: NDArray[np.float32]) -> Figure:
    """Classes in colours; clients in markers, where there are few enough to tell apart."""
    figure, (ax,) = panels(1, width=7.2, height=5.6)
    clients = list(dict.fromkeys(point.client for point in points))
    labels = sorted({point.label for point in points})
    shades = colormaps["turbo"](np.linspace(0.04, 0.96, len(labels)))
    markers = MARKERS if len(clients) <= len(MARKERS) else "o" * len(clients)
    for client, marker in zip(clients, markers, strict=False):
        mine = [place for place, point in enumerate(points) if point.client == client]
        colors = [shades[labels.index(points[place].label)] for place in mine]
        ax.scatter(places[mine, 0], places[mine, 1], s=18, c=colors, marker=marker, alpha=0.8, lw=0.3, ec="white")
    ax.set_title(f"Representations of {len(points)} test examples at {len(clients)} clients")
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    spots = [Line2D([], [], ls="", marker="o", color=shade) for shade in shades]
    named = [(spot, f"class {label}") for spot, label in zip(spots, labels, strict=True)] if len(labels) <= 20 else []
    if markers is MARKERS:
        named += [(Line2D([], [], ls="", marker=m, color=GREY), c) for m, c in zip(markers, clients, strict=False)]
    if named:
        ax.legend(*zip(*named, strict=True), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return figure
