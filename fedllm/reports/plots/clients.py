"""The plots of a run that show its clients: how they learn, what they hold, how good their own models are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedllm.reports.plots.style import (
    DOWN,
    GREY,
    LABELS,
    boxes,
    by_round,
    colors_of,
    complete,
    label_ends,
    line,
    merged,
    names_above,
    panels,
    percents,
    plain,
    rounds_of,
    short,
    whole,
)
from fedllm.reports.run_record import Member, Points, Story, client_scores, clipped, natural, own_keys


def clients(story: Story) -> Figure | None:
    """Every client's train loss in the colour of its rank or level."""
    curves = {member: story.curve("clients", member.id, "train_loss") for member in story.members}
    curves = {member: points for member, points in curves.items() if points}
    if not curves:
        return None
    figure, (ax,) = panels(1, width=7.2, height=3.6)
    ax.set_title(f"Train loss of each client{story.sorted_by}")
    ax.set_ylabel("cross-entropy, nats")
    colors = colors_of(member.kind for member in story.members)
    if len(story.rounds) == 1:
        strip(ax, {member: points[0][1] for member, points in curves.items()}, colors)
        return figure
    few = len(curves) <= 10 and complete(curves.values())
    ends = few_lines(ax, curves, colors) if few else many_lines(ax, curves, colors)
    by_round(ax, story)
    label_ends(ax, ends, height=3.6)
    return figure


def few_lines(ax: Axes, curves: Mapping[Member, Points], colors: Mapping[str, Any]) -> list[tuple[float, str, Any]]:
    for member, points in curves.items():
        line(ax, points, colors[member.kind], width=1.8)
    return [(points[-1][1], told(m, 18), colors[m.kind]) for m, points in curves.items()]


def many_lines(ax: Axes, curves: Mapping[Member, Points], colors: Mapping[str, Any]) -> list[tuple[float, str, Any]]:
    """Every client as a hair, and the median of each rank or level."""
    ends, rounds = [], rounds_of(curves.values())
    for kind, group in groupby(curves, key=lambda member: member.kind):
        members = list(group)
        for member in members:
            line(ax, curves[member], colors[kind], width=0.6, alpha=0.25, dots=False, rounds=rounds)
        middle = merged((curves[member] for member in members), median)
        line(ax, middle, colors[kind], width=2.4, rounds=rounds)
        words = f"{kind}, median of {len(members)}".removeprefix(", ") if len(members) > 1 else told(members[0], 18)
        ends.append((middle[-1][1], words, colors[kind]))
    return ends


def strip(ax: Axes, values: Mapping[Member, float], colors: Mapping[str, Any]) -> None:
    """One value a client, side by side within its rank or level."""
    ordered = list(colors)
    for place, kind in enumerate(ordered):
        group = [(member, value) for member, value in values.items() if member.kind == kind]
        for at, (member, value) in enumerate(group):
            x = place + 0.6 * ((at + 0.5) / len(group) - 0.5)
            ax.plot([x], [value], marker="o", ms=6, color=colors[kind], mec="white", mew=0.6)
            if len(values) <= 10:
                name = short(member.id, 14)
                ax.annotate(name, (x, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xticks(range(len(ordered)), ordered)
    ax.set_xlim(-0.6, len(ordered) - 0.4)
    ax.margins(y=0.15)


def data(story: Story) -> Figure | None:
    """Rows and label mix of each client: stacked bars, or a map where colours could not tell the labels apart."""
    members = [member for member in story.members if member.rows or member.labels]
    if not members:
        return None
    totals: Counter[str] = Counter()
    for member in members:
        totals.update({label: int(count) for label, count in member.labels.items()})
    labels = sorted(totals, key=natural) if len(totals) > len(LABELS) else [label for label, _ in totals.most_common()]
    many, kinds = len(members) > 24, list(dict.fromkeys(member.kind for member in members))
    figure, (ax,) = panels(1, width=7.2, height=3.4 if many else 1.4 + 0.26 * len(members))
    ax.set_title("Rows of each client" + (", by label" if len(labels) > 1 else ""))
    if len(labels) > len(LABELS):
        label_map(figure, ax, members, labels)
        return figure
    members = sorted(members, key=lambda m: (kinds.index(m.kind), -m.rows)) if many else members
    parts = [(label, [m.labels.get(label, 0.0) for m in members], c) for label, c in zip(labels, LABELS, strict=False)]
    base = [0.0] * len(members)
    for _, counts, color in parts or [("", [float(member.rows) for member in members], DOWN)]:
        if many:
            ax.bar(range(len(members)), counts, 1.0, base, color=color)
        else:
            ax.barh(range(len(members)), counts, 0.72, base, color=color, ec="white", lw=0.6)
        base = [low + count for low, count in zip(base, counts, strict=True)]
    if many:
        kind_ticks(ax, members)
        ax.set_ylabel("rows")
        whole(ax.yaxis)
    else:
        name_ticks(ax, members)
        ax.set_xlabel("rows")
        whole(ax.xaxis)
    if len(labels) > 1:
        names_above(ax, [(clipped(label, 18), color) for label, _, color in parts])
    return figure


def label_map(figure: Figure, ax: Axes, members: Sequence[Member], labels: Sequence[str]) -> None:
    """Rows of every label (down) at every client (across)."""
    counts = [[member.labels.get(label, 0.0) for member in members] for label in labels]
    image = ax.imshow(counts, aspect="auto", cmap="Blues", interpolation="nearest", vmin=0)
    figure.set_size_inches(7.2, max(3.0, 1.4 + 0.2 * min(len(labels), 30)))
    ax.grid(visible=False)
    ax.set_title("Rows of each label at each client")
    shown = range(0, len(labels), max(1, -(-len(labels) // 30)))
    ax.set_yticks(list(shown), [clipped(labels[place], 18) for place in shown])
    ax.set_ylabel("label")
    if len(members) <= 12:
        ax.set_xticks(range(len(members)), [f"{short(m.id, 12)}\n{m.kind}" for m in members])
    else:
        kind_ticks(ax, members)
    bar = figure.colorbar(image, ax=ax, label="rows", shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)
    whole(bar.ax.yaxis)


def name_ticks(ax: Axes, members: Sequence[Member]) -> None:
    """Clients down the left side, for horizontal bars."""
    ax.set_yticks(range(len(members)), [told(member, 20) for member in members])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(members) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)


def kind_ticks(ax: Axes, members: Sequence[Member]) -> None:
    """Ranks or levels below, each in the middle of its clients, for many vertical bars."""
    groups = [(kind, list(group)) for kind, group in groupby(range(len(members)), key=lambda i: members[i].kind)]
    ax.set_xticks([fmean(places) for _, places in groups], [kind for kind, _ in groups])
    for _, places in groups[1:]:
        ax.axvline(places[0] - 0.5, color="#CCCCCC", lw=0.8)
    ax.set_xlim(-0.7, len(members) - 0.3)
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel(f"{len(members)} clients")


def told(member: Member, most: int) -> str:
    """A client's name, and its rank or level where it has one."""
    return ", ".join(filter(None, [short(member.id, most), member.kind]))


def own(story: Story) -> Figure | None:
    """Boxes of the clients' scores, each of its own model after its last round: of all, and of each rank or level."""
    keys = own_keys(story)
    if not keys:
        return None
    figure, axes = panels(len(keys), width=6.2)
    for ax, key in zip(axes, keys, strict=True):
        scores = client_scores(story, "own", key)
        groups = {f"all {len(scores)}": list(scores.values())}
        kinds = list(dict.fromkeys(member.kind for member in scores))
        groups |= {k: [v for m, v in scores.items() if m.kind == k] for k in kinds if len(kinds) > 1}
        colors = colors_of(kinds) if len(kinds) > 1 else {}
        boxes(ax, groups, [GREY, *(colors.values())])
        ax.set_title(f"{plain(key).removeprefix('own ').capitalize()} of each client's own model{story.sorted_by}")
        ax.set_ylabel("of its test rows")
        percents(ax.yaxis)
    return figure
