"""The plot of a run's average: the share of each client in it, and what truncation cuts off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedllm.reports.plots.clients import kind_ticks, name_ticks
from fedllm.reports.plots.style import (
    INK,
    UP,
    by_round,
    colors_of,
    kind_lines,
    label_ends,
    names_above,
    panels,
    percents,
)
from fedllm.reports.run_record import Member, Story, map_numbers, mapping


def ranks(story: Story) -> Figure | None:
    """The share of each client, and rank or level, in the average, and what truncation cuts off."""
    weighed = [m for m in story.members if story.curve("weights", m.id)]
    errors = {member.id: story.curve("truncation_error", member.id) for member in story.members}
    cut = any(value > 0 for points in errors.values() for _, value in points)
    if not weighed and not cut:
        return None
    colors = colors_of(member.kind for member in story.members)
    figure, axes = panels(2 * bool(weighed) + cut, width=4.6)
    if weighed:
        weights_by_round(axes[0], story)
        weights_by_client(axes[1], story, weighed, colors)
    if cut:
        ax = axes[-1]
        ax.set_title(f"Truncation error{story.sorted_by}")
        ax.set_ylabel("Frobenius norm of what is cut off")
        ends = kind_lines(ax, story, errors)
        ax.set_ylim(bottom=0)
        by_round(ax, story)
        label_ends(ax, ends)
    return figure


def weights_by_round(ax: Axes, story: Story) -> None:
    ax.set_title(f"Weight of one client{story.sorted_by}")
    ax.set_ylabel("share in the average")
    ends = kind_lines(ax, story, {member.id: story.curve("weights", member.id) for member in story.members})
    sizes = {len(mapping(rnd.get("weights"))) for rnd in story.rounds} - {0}
    if len(sizes) == 1:
        equal = 1 / sizes.pop()
        ax.axhline(equal, color=INK, lw=1.1, ls="--", zorder=1)
        ends.append((equal, "equal shares", INK))
    values = [value for value, _, _ in ends]
    if max(values) - min(values) < 0.05 * max(values):  # no mountains out of rounding errors
        ax.set_ylim(min(values) - 0.05 * max(values), max(values) + 0.05 * max(values))
    percents(ax.yaxis)
    by_round(ax, story)
    label_ends(ax, ends)


def weights_by_client(ax: Axes, story: Story, weighed: Sequence[Member], colors: Mapping[str, Any]) -> None:
    """Bars of the mean weight, and a line where the share of the rows would put it (FedAvg)."""
    fedavg = row_shares(story)
    many = len(weighed) > 12
    kinds = list(colors)
    members = sorted(weighed, key=lambda m: (kinds.index(m.kind), fedavg.get(m.id, 0.0))) if many else weighed
    weights = [fmean(value for _, value in story.curve("weights", member.id)) for member in members]
    shades = [colors[member.kind] for member in members]
    known = [(place, fedavg[member.id]) for place, member in enumerate(members) if member.id in fedavg]
    places, shares = [place for place, _ in known], [share for _, share in known]
    starts, ends = [place - 0.42 for place in places], [place + 0.42 for place in places]
    by = story.sorted_by.removeprefix(", by ")
    ax.set_title("Mean weight of each client")
    part = f"{len(weighed)} of {len(story.members)} clients were averaged" * (len(weighed) < len(story.members))
    if many:
        ax.bar(range(len(members)), weights, 1.0, color=shades)
        ax.hlines(shares, starts, ends, color=UP, lw=1.8)
        percents(ax.yaxis)
        ax.set_ylabel("share in the average")
        kind_ticks(ax, members)
        ax.set_xlabel(part or ax.get_xlabel())
    else:
        ax.barh(range(len(members)), weights, 0.72, color=shades)
        ax.vlines(shares, starts, ends, color=UP, lw=2)
        percents(ax.xaxis)
        name_ticks(ax, members)
        ax.set_xlabel(", ".join(filter(None, ["share in the average", part])))
    if known:
        names_above(ax, [("weight" + f", in the colour of the {by}" * bool(by), shades[0]), ("share of the rows", UP)])


def row_shares(story: Story) -> dict[str, float]:
    """``n_i / n`` among those whose updates were averaged, the mean over a client's rounds."""
    rows = {member.id: member.rows for member in story.members}
    shares: dict[str, list[float]] = {}
    for rnd in story.rounds:
        cohort = [id for id, _ in map_numbers(rnd.get("weights"))]
        total = sum(rows.get(id, 0) for id in cohort)
        for id in cohort if total else []:
            shares.setdefault(id, []).append(rows.get(id, 0) / total)
    return {id: fmean(values) for id, values in shares.items()}
