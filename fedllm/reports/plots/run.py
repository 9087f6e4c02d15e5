"""The plots of a run: each a function from its story to a figure, or to None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedllm.reports.formatting import is_fraction, metric, number, size
from fedllm.reports.plots.clients import clients, data, few_lines, own
from fedllm.reports.plots.conditioning import SMALLEST, conditioning
from fedllm.reports.plots.style import (
    DOWN,
    GREY,
    INK,
    LINES,
    UP,
    by_round,
    colors_of,
    complete,
    in_bytes,
    in_decades,
    kind_lines,
    label_ends,
    line,
    panels,
    percents,
    plain,
    save,
    short,
    styled,
)
from fedllm.reports.plots.weights import ranks
from fedllm.reports.run_record import (
    Member,
    Points,
    Story,
    base_row,
    clipped,
    leaves,
    lower_is_better,
    rows_of,
)
from fedllm.storage.files import make_folder


def draw(story: Story, folder: Path) -> list[str]:
    """Draws what the run has; the names of the plots written, without the suffix. Stale ones are removed."""
    make_folder(folder)
    drawn = []
    with styled():
        for name, plot in PLOTS.items():
            figure = plot(story)
            if figure is None:
                (folder / f"{name}.png").unlink(missing_ok=True)
                continue
            save(figure, folder / f"{name}.png")
            drawn.append(name)
    return drawn


def learning(story: Story) -> Figure | None:
    """Train and held-out loss, then every score, by round, against the base model."""
    keys = story.keys("eval")
    losses = [key for key in keys if "loss" in key.lower()]
    others = [key for key in keys if key not in losses][:8]
    if not story.curve("train_loss") and not keys:
        return None
    figure, axes = panels(1 + len(others))
    loss_panel(axes[0], story, losses)
    for ax, key in zip(axes[1:], others, strict=True):
        score_panel(ax, story, key)
    return figure


def loss_panel(ax: Axes, story: Story, losses: Sequence[str]) -> None:
    ax.set_title("Loss")
    ends: list[tuple[float, str, Any]] = []
    curves = [("training", story.curve("train_loss"), GREY)]
    for key, color in zip(losses, LINES, strict=False):
        curves.append(("held out" if key == "loss" else plain(key), story.curve("eval", key), color))
    for name, points, color in curves:
        if points:
            line(ax, points, color)
            ends.append((points[-1][1], f"{name} {metric('loss', points[-1][1])}", color))
    if "loss" in losses:
        ends += references(ax, story, "loss")
    by_round(ax, story)
    ax.set_ylabel("cross-entropy, nats")
    label_ends(ax, ends)


def score_panel(ax: Axes, story: Story, key: str) -> None:
    ax.set_title(plain(key).capitalize())
    points = story.curve("eval", key)
    line(ax, points, LINES[0])
    ends = [(points[-1][1], f"federated {metric(key, points[-1][1])}", LINES[0])]
    ends += references(ax, story, key)
    by_round(ax, story)
    if is_fraction(key):
        top = max(0.05, *(value for value, _, _ in ends), *(value for _, value in points))
        ax.set_ylim(-0.02 * top, 1.02 if 0.94 < top <= 1 else top * 1.08)
        percents(ax.yaxis)
        ax.set_ylabel("of the held-out rows")
    label_ends(ax, ends)


def references(ax: Axes, story: Story, key: str) -> list[tuple[float, str, Any]]:
    """The base model as a dashed line and the best client alone as a dotted one, where the summary has them."""
    base = base_row(story.summary)
    known = [(number(row.get(key)), str(row.get("name", ""))) for row in rows_of(story.summary)]
    alone = sorted((value, name) for value, name in known if value is not None and "alone" in name.lower())
    lines = [(number(base.get(key)), str(base.get("name", "")), "--")]
    lines += [(value, name, ":") for value, name in (alone[:1] if lower_is_better(key) else alone[-1:])]
    ends: list[tuple[float, str, Any]] = []
    for value, name, style in lines:
        if value is not None:
            ax.axhline(value, color=INK, lw=1.1, ls=style, zorder=1)
            ends.append((value, f"{clipped(name, 22)} {metric(key, value)}", INK))
    return ends


def traffic(story: Story) -> Figure | None:
    """Bytes by round, and of a client's round by rank or level."""
    down, up = story.curve("bytes_down"), story.curve("bytes_up")
    if not down and not up:
        return None
    by = {
        kind: [merged_mean(story, group, key) for key in ("bytes_down", "bytes_up")]
        for kind, group in story.by_kind().items()
    }
    by = {kind: pair for kind, pair in by.items() if any(pair)}
    figure, axes = panels(2 if by else 1, width=5.2)
    totals = [sum(value for _, value in points) for points in (down, up)]
    names = [(f"down, {size(totals[0])} in all", DOWN), (f"up, {size(totals[1])} in all", UP)]
    axes[0].set_title("Bytes of each round")
    if len(story.rounds) <= 30:
        paired_bars(axes[0], dict(down), dict(up))
    else:
        line(axes[0], down, DOWN)
        line(axes[0], up, UP)
    in_bytes(axes[0], names)
    by_round(axes[0], story)
    if len(story.rounds) < 4:  # a bar is no wall
        middle = (story.rounds[0]["round"] + story.rounds[-1]["round"]) / 2
        axes[0].set_xlim(middle - 2.5, middle + 2.5)
    if by:
        axes[1].set_title(f"Bytes of one client's round{story.sorted_by}")
        pairs = list(by.values())
        paired_bars(axes[1], {x: d for x, (d, _) in enumerate(pairs)}, {x: u for x, (_, u) in enumerate(pairs)})
        in_bytes(axes[1], [("down", DOWN), ("up", UP)])
        axes[1].set_xticks(range(len(by)), list(by))
        axes[1].set_xlim(-0.8, len(by) - 0.2)
    return figure


def merged_mean(story: Story, group: Sequence[Member], key: str) -> float:
    values = [value for member in group for _, value in story.curve("clients", member.id, key)]
    return fmean(values) if values else 0.0


def paired_bars(ax: Axes, down: Mapping[int, float], up: Mapping[int, float]) -> None:
    ax.bar([x - 0.2 for x in down], list(down.values()), 0.38, color=DOWN)
    ax.bar([x + 0.2 for x in up], list(up.values()), 0.38, color=UP)


@dataclass(frozen=True)
class Panel:
    """How the numbers of one parent are shown.

    Args:
        unit: what is at the vertical axis.
        words: a line's name, from its key.
        share: whether the numbers are shares of 1.
        decades: whether the axis is logarithmic.
    """

    title: str
    unit: str = ""
    words: str = "{}"
    share: bool = False
    decades: bool = False


TELEMETRY = {
    "served_error": Panel("Error of what is served", "distance from the ideal mean,\nshare of its norm", share=True),
    "truncation": Panel("Truncation error of what is served", "share of its norm", "rank {}", share=True),
    "rank": Panel("Rank of what is served", "directions, mean over modules"),
    "singular_values": Panel(
        "Top singular values of what is served", "root mean square over modules", "place {}", decades=True
    ),
    "drift": Panel("Drift of one client in a round", "norm of its step"),
    "cosine": Panel("One client against the mean", "cosine of its step to the mean step"),
}
"""What ``fedllm.server.telemetry`` measures."""


def telemetry(story: Story) -> Figure | None:
    """Whatever else was measured, one panel for the numbers of one parent."""
    found = measured(story)
    if not found:
        return None
    figure, axes = panels(len(found))
    ids = {member.id for member in story.members}
    for ax, (group, curves) in zip(axes, found.items(), strict=True):
        panel = TELEMETRY.get(group[0]) or Panel(clipped(" / ".join(map(plain, group)), 44))
        by_client = curves.keys() <= ids
        ax.set_title(panel.title + story.sorted_by * by_client)
        ax.set_ylabel(panel.unit)
        ends = client_lines(ax, story, curves) if by_client else named_lines(ax, story, panel, curves)
        by_round(ax, story)
        label_ends(ax, ends)
    return figure


def measured(story: Story, most: int = 12) -> dict[tuple[str, ...], dict[str, Points]]:
    """The curves of each parent, but for those that have a picture of their own."""
    found: dict[tuple[str, ...], dict[str, Points]] = {}
    for rnd in story.rounds:
        for (*parent, leaf), value in leaves((), rnd.get("telemetry")):
            group = tuple(parent) or (leaf,)
            if group != (SMALLEST,):
                found.setdefault(group, {}).setdefault(leaf, []).append((rnd["round"], value))
    if errors := found.get(("served_error",), {}).pop("served_error", None):
        rounds, values = zip(*errors, strict=True)  # a bias adds up: by now, at most this has been lost
        sums = list(zip(rounds, accumulate(values), strict=True))
        found["served_error",] = {"in the round": errors, "added up so far": sums}
    return dict(list(found.items())[:most])


def client_lines(ax: Axes, story: Story, curves: Mapping[str, Points]) -> list[tuple[float, str, Any]]:
    if len(curves) > 8 or not complete(curves.values()):
        return kind_lines(ax, story, curves)
    members = {member: curves[member.id] for member in story.members if member.id in curves}
    return few_lines(ax, members, colors_of(member.kind for member in story.members))


def named_lines(ax: Axes, story: Story, panel: Panel, curves: Mapping[str, Points]) -> list[tuple[float, str, Any]]:
    """A line a key, with its last value; those of clients' ranks in the ranks' colours. Of too many none is named."""
    names = {leaf: panel.words.format(short(leaf, 16)) for leaf in curves}
    colors = colors_of(member.kind for member in story.members)
    others = [GREY] if colors.keys() & set(names.values()) else LINES
    ends: list[tuple[float, str, Any]] = []
    for place, (leaf, points) in enumerate(curves.items()):
        color = colors.get(names[leaf], others[place % len(others)])
        line(ax, points, color, width=1.8 if len(curves) <= 14 else 0.8)
        last = percent(points[-1][1]) if panel.share else metric("loss", points[-1][1])
        ends.append((points[-1][1], f"{names[leaf]}: {last}" if len(curves) > 1 else last, color))
    if panel.share:
        top = max(1e-3, ax.get_ylim()[1])
        ax.set_ylim(-0.02 * top, top)  # no mountains out of rounding errors
        percents(ax.yaxis)
    elif panel.decades:
        in_decades(ax)
    return ends if len(ends) <= 14 else []


def percent(share: float) -> str:
    return "< 0.001%" if 0 < share < 1e-5 else f"{100 * share:.3g}%"


PLOTS: dict[str, Callable[[Story], Figure | None]] = {
    "learning": learning,
    "clients": clients,
    "own": own,
    "data": data,
    "ranks": ranks,
    "traffic": traffic,
    "telemetry": telemetry,
    "conditioning": conditioning,
}
"""Every plot by its file's name."""
