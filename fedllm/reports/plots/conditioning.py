"""How far every layer of a network is from losing a direction, by round (FedLMT's Figures 7 and 8)."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedllm.reports.plots.style import GREY, INK, LINES, by_round, label_ends, line, panels, rounds_of, short
from fedllm.reports.run_record import Points, Story, at, map_numbers

SMALLEST = "smallest_singular_value"
"""Where the telemetry has them, by layer."""

NAMED = 8
"""With more layers, only the two that end lowest and highest are named."""


def conditioning(story: Story) -> Figure | None:
    """Each layer's smallest singular value as a thin line, the smallest of all as a thick one; decades up."""
    layers: dict[str, Points] = {}
    for rnd in story.rounds:
        for layer, value in map_numbers(at(rnd, "telemetry", SMALLEST)):
            if value > 0:
                layers.setdefault(layer, []).append((rnd["round"], math.log10(value)))
    if not layers:
        return None
    figure, (ax,) = panels(1, width=7.2, height=3.6)
    ax.set_title("Smallest singular value of each layer")
    last = {layer: points[-1][1] for layer, points in layers.items()}
    named = layers if len(layers) <= NAMED else {min(last, key=last.__getitem__), max(last, key=last.__getitem__)}
    ends: list[tuple[float, str, Any]] = []
    rounds = rounds_of(layers.values())
    for layer, points in layers.items():
        color = LINES[len(ends) % len(LINES)] if layer in named else GREY
        line(ax, points, color, width=1.0, dots=False, rounds=rounds)
        ends += [(last[layer], f"{short(layer, 24)}: {10 ** last[layer]:.2g}", color)] if layer in named else []
    every = [point for points in layers.values() for point in points]
    lowest = {index: min(value for i, value in every if i == index) for index in rounds}
    line(ax, list(lowest.items()), INK, width=2.4, dots=len(lowest) == 1)
    by_round(ax, story)
    ax.set_ylabel("singular value (thick: the least of all)")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.2g}"))
    label_ends(ax, ends, height=3.6)
    return figure
