"""The plots of a run: each a function from its story to a figure, or to None where the run has nothing to show there.

Colours say rank wherever clients appear (dark for small, bright for large), and words stand at the lines they name.
Figures are made without pyplot, whose list of figures every caller would share.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedllm.conditioning_plots import SMALLEST, conditioning
from fedllm.progress import is_fraction, metric, number, size
from fedllm.story import (
    Member,
    Points,
    Story,
    base_row,
    clipped,
    leaves,
    lower_is_better,
    map_numbers,
    mapping,
    natural,
    rows_of,
)

DPI = 110
DOWN, UP, GREY, INK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
LABELS = ("#332288", "#88CCEE", "#44AA99", "#DDCC77", "#CC6677", "#AA4499", "#117733", "#999933", "#882255")
"""Nine colours of areas that stay apart for colour-blind eyes (Paul Tol's "muted" scheme)."""
LINES = ("#332288", "#CC6677", "#117733", "#AA4499", "#0077BB", "#882255", "#999933")
"""Those of them that a thin line and a word can have on white."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a "$" in a client's name is a "$"
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
}


def draw(story: Story, folder: Path) -> list[str]:
    """Draws what the run has; the names of the plots written, without the suffix. Stale ones are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for name, plot in PLOTS.items():
            figure = plot(story)
            if figure is None:
                (folder / f"{name}.png").unlink(missing_ok=True)
                continue
            FigureCanvasAgg(figure)
            figure.savefig(folder / f"{name}.png", dpi=DPI)
            drawn.append(name)
    return drawn


def panels(count: int, width: float = 4.6, height: float = 3.1, columns: int = 3) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 5.2), height * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def by_round(axes: Axes, story: Story) -> None:
    """The horizontal axis of rounds: every round has a tick where few were run."""
    rounds = [rnd["round"] for rnd in story.rounds]
    room = max(0.6, 0.02 * (rounds[-1] - rounds[0]))
    axes.set_xlim(rounds[0] - room, rounds[-1] + room)
    if len(rounds) <= 8:
        axes.set_xticks(rounds)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    axes.set_xlabel("round")


def line(
    axes: Axes, points: Points, color: Any, width: float = 2.0, alpha: float = 1.0, dots: bool | None = None
) -> None:
    """A curve, with a dot at each point where there are few."""
    few = len(points) <= 12 if dots is None else dots
    x, y = [index for index, _ in points], [value for _, value in points]
    dot = 7.0 if len(points) == 1 else 2.2 + width
    axes.plot(x, y, color=color, lw=width, alpha=alpha, marker="o" if few else None, ms=dot, mec="white", mew=0.6)


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, Any]], height: float = 3.1) -> None:
    """Words at the right edge, each at its own height and pushed apart where they would overlap.

    Args:
        labels: the value where each belongs, its words, its colour.
        height: of the panel in inches.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap = 11 / (72 * height * 0.72)
    spots: list[float] = []
    ordered = sorted(labels, key=lambda label: label[0])
    for value, _, _ in ordered:
        spot = min(1.0, max(0.0, (value - low) / (high - low)))
        spots.append(max(spot, spots[-1] + gap) if spots else spot)
    over = max(0.0, spots[-1] - 1.0) if spots else 0.0
    for place in range(len(spots) - 1, -1, -1):  # too high at the top: let those below make room
        ceiling = spots[place + 1] - gap if place + 1 < len(spots) else spots[place] - over
        spots[place] = min(spots[place], ceiling)
    for spot, (_, words, color) in zip(spots, ordered, strict=True):
        axes.text(
            1.015, spot, words, color=inked(color), transform=axes.transAxes, va="center", fontsize=8, clip_on=False
        )


def inked(color: Any) -> Any:
    """A colour dark enough for small words on white."""
    red, green, blue = to_rgb(color)
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return color if light < 0.4 else (red * 0.4 / light, green * 0.4 / light, blue * 0.4 / light)


def names_above(axes: Axes, named: Sequence[tuple[str, Any]]) -> None:
    """The names of colours in rows above the panel, for what has no line's end to stand at."""
    columns = max(1, min(len(named), 80 // (4 + max(len(name) for name, _ in named))))
    axes.legend(
        [Patch(color=color) for _, color in named],
        [name for name, _ in named],
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8,
        handlelength=0.9,
        handleheight=0.9,
        handletextpad=0.5,
        columnspacing=1.4,
        borderaxespad=0.2,
    )
    axes.set_title(axes.get_title(loc="left"), pad=8 + 14 * -(-len(named) // columns))


def colors_of(ranks: Iterable[int]) -> dict[int, Any]:
    """Ranks are ordered, so their colours are: from dark to bright, and no yellow on white."""
    ordered = sorted(set(ranks))
    scale = matplotlib.colormaps["viridis"]
    return {rank: scale(0.78 * place / max(1, len(ordered) - 1)) for place, rank in enumerate(ordered)}


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


def clients(story: Story) -> Figure | None:
    """Every client's train loss in its colour of rank."""
    curves = {member: story.curve("clients", member.id, "train_loss") for member in story.members}
    curves = {member: points for member, points in curves.items() if points}
    if not curves:
        return None
    figure, (ax,) = panels(1, width=7.2, height=3.6)
    ax.set_title("Train loss of each client, by rank")
    ax.set_ylabel("cross-entropy, nats")
    colors = colors_of(member.rank for member in story.members)
    if len(story.rounds) == 1:
        strip(ax, {member: points[0][1] for member, points in curves.items()}, colors)
        return figure
    ends = few_lines(ax, curves, colors) if len(curves) <= 10 else many_lines(ax, curves, colors)
    by_round(ax, story)
    label_ends(ax, ends, height=3.6)
    return figure


def few_lines(ax: Axes, curves: Mapping[Member, Points], colors: Mapping[int, Any]) -> list[tuple[float, str, Any]]:
    for member, points in curves.items():
        line(ax, points, colors[member.rank], width=1.8)
    return [(points[-1][1], f"{short(m.id, 18)}, rank {m.rank}", colors[m.rank]) for m, points in curves.items()]


def many_lines(ax: Axes, curves: Mapping[Member, Points], colors: Mapping[int, Any]) -> list[tuple[float, str, Any]]:
    """Every client as a hair, and the median of each rank."""
    ends = []
    for rank, group in groupby(curves, key=lambda member: member.rank):
        members = list(group)
        for member in members:
            line(ax, curves[member], colors[rank], width=0.6, alpha=0.25, dots=len(curves[member]) == 1)
        middle = merged((curves[member] for member in members), median)
        line(ax, middle, colors[rank], width=2.4)
        ends.append((middle[-1][1], f"rank {rank}, median of {len(members)}", colors[rank]))
    return ends


def strip(ax: Axes, values: Mapping[Member, float], colors: Mapping[int, Any]) -> None:
    """One value a client, side by side within its rank."""
    ordered = list(colors)
    for place, rank in enumerate(ordered):
        group = [(member, value) for member, value in values.items() if member.rank == rank]
        for at, (member, value) in enumerate(group):
            x = place + 0.6 * ((at + 0.5) / len(group) - 0.5)
            ax.plot([x], [value], marker="o", ms=6, color=colors[rank], mec="white", mew=0.6)
            if len(values) <= 10:
                name = short(member.id, 14)
                ax.annotate(name, (x, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xticks(range(len(ordered)), [str(rank) for rank in ordered])
    ax.set_xlim(-0.6, len(ordered) - 0.4)
    ax.margins(y=0.15)
    ax.set_xlabel("rank")


def merged(curves: Iterable[Points], how: Callable[[list[float]], float]) -> Points:
    """One curve out of many: at each round, of those that have a value there."""
    found: dict[int, list[float]] = {}
    for points in curves:
        for index, value in points:
            found.setdefault(index, []).append(value)
    return [(index, how(values)) for index, values in sorted(found.items())]


def traffic(story: Story) -> Figure | None:
    """Bytes by round, and of a client's round by rank."""
    down, up = story.curve("bytes_down"), story.curve("bytes_up")
    if not down and not up:
        return None
    by = {
        rank: [merged_mean(story, group, key) for key in ("bytes_down", "bytes_up")]
        for rank, group in story.by_rank().items()
    }
    by = {rank: pair for rank, pair in by.items() if any(pair)}
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
        axes[1].set_title("Bytes of one client's round, by rank")
        pairs = list(by.values())
        paired_bars(axes[1], {x: d for x, (d, _) in enumerate(pairs)}, {x: u for x, (_, u) in enumerate(pairs)})
        in_bytes(axes[1], [("down", DOWN), ("up", UP)])
        axes[1].set_xticks(range(len(by)), [str(rank) for rank in by])
        axes[1].set_xlim(-0.8, len(by) - 0.2)
        axes[1].set_xlabel("rank")
    return figure


def merged_mean(story: Story, group: Sequence[Member], key: str) -> float:
    values = [value for member in group for _, value in story.curve("clients", member.id, key)]
    return fmean(values) if values else 0.0


def paired_bars(ax: Axes, down: Mapping[int, float], up: Mapping[int, float]) -> None:
    ax.bar([x - 0.2 for x in down], list(down.values()), 0.38, color=DOWN)
    ax.bar([x + 0.2 for x in up], list(up.values()), 0.38, color=UP)


def in_bytes(ax: Axes, names: Sequence[tuple[str, Any]]) -> None:
    names_above(ax, names)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))


def ranks(story: Story) -> Figure | None:
    """The share of each rank and client in the average, and what truncation cuts off."""
    weighed = [m for m in story.members if story.curve("weights", m.id)]
    errors = {
        rank: merged((story.curve("truncation_error", member.id) for member in group), fmean)
        for rank, group in story.by_rank().items()
    }
    errors = {rank: points for rank, points in errors.items() if points}
    cut = any(value > 0 for points in errors.values() for _, value in points)
    if not weighed and not cut:
        return None
    colors = colors_of(member.rank for member in story.members)
    figure, axes = panels(2 * bool(weighed) + cut, width=4.6)
    if weighed:
        weights_by_round(axes[0], story, colors)
        weights_by_client(axes[1], story, weighed, colors)
    if cut:
        ax = axes[-1]
        ax.set_title("Truncation error, by rank")
        ax.set_ylabel("Frobenius norm of what is cut off")
        for rank, points in errors.items():
            line(ax, points, colors[rank])
        ax.set_ylim(bottom=0)
        by_round(ax, story)
        label_ends(ax, [(points[-1][1], f"rank {rank}", colors[rank]) for rank, points in errors.items()])
    return figure


def weights_by_round(ax: Axes, story: Story, colors: Mapping[int, Any]) -> None:
    ax.set_title("Weight of one client, by rank")
    ax.set_ylabel("share in the average")
    ends = []
    for rank, group in story.by_rank().items():
        curves = [points for member in group if (points := story.curve("weights", member.id))]
        if not curves:
            continue
        middle, low, high = merged(curves, fmean), merged(curves, min), merged(curves, max)
        rounds = [index for index, _ in middle]
        ax.fill_between(rounds, [v for _, v in low], [v for _, v in high], color=colors[rank], alpha=0.15, lw=0)
        line(ax, middle, colors[rank])
        ends.append((middle[-1][1], f"rank {rank}", colors[rank]))
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


def percents(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def weights_by_client(ax: Axes, story: Story, weighed: Sequence[Member], colors: Mapping[int, Any]) -> None:
    """Bars of the mean weight, and a line where the share of the rows would put it (FedAvg)."""
    fedavg = row_shares(story)
    many = len(weighed) > 12
    members = sorted(weighed, key=lambda m: (m.rank, fedavg.get(m.id, 0.0))) if many else weighed
    weights = [fmean(value for _, value in story.curve("weights", member.id)) for member in members]
    shades = [colors[member.rank] for member in members]
    known = [(place, fedavg[member.id]) for place, member in enumerate(members) if member.id in fedavg]
    places, shares = [place for place, _ in known], [share for _, share in known]
    starts, ends = [place - 0.42 for place in places], [place + 0.42 for place in places]
    ax.set_title("Mean weight of each client")
    if many:
        ax.bar(range(len(members)), weights, 1.0, color=shades)
        ax.hlines(shares, starts, ends, color=UP, lw=1.8)
        percents(ax.yaxis)
        ax.set_ylabel("share in the average")
        rank_ticks(ax, members)
    else:
        ax.barh(range(len(members)), weights, 0.72, color=shades)
        ax.vlines(shares, starts, ends, color=UP, lw=2)
        percents(ax.xaxis)
        name_ticks(ax, members)
        ax.set_xlabel("share in the average")
    if known:
        names_above(ax, [("weight, in the colour of the rank", shades[0]), ("share of the rows", UP)])


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


def name_ticks(ax: Axes, members: Sequence[Member]) -> None:
    """Clients down the left side, for horizontal bars."""
    ax.set_yticks(range(len(members)), [f"{short(member.id, 20)}, rank {member.rank}" for member in members])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(members) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)


def rank_ticks(ax: Axes, members: Sequence[Member]) -> None:
    """Ranks below, each in the middle of its clients, for many vertical bars."""
    groups = [(rank, list(group)) for rank, group in groupby(range(len(members)), key=lambda i: members[i].rank)]
    ax.set_xticks([fmean(places) for _, places in groups], [f"rank {rank}" for rank, _ in groups])
    for _, places in groups[1:]:
        ax.axvline(places[0] - 0.5, color="#CCCCCC", lw=0.8)
    ax.set_xlim(-0.7, len(members) - 0.3)
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel(f"{len(members)} clients")


def data(story: Story) -> Figure | None:
    """Rows and label mix of each client: stacked bars, or a map where colours could not tell the labels apart."""
    members = [member for member in story.members if member.rows or member.labels]
    if not members:
        return None
    totals: Counter[str] = Counter()
    for member in members:
        totals.update({label: int(count) for label, count in member.labels.items()})
    labels = sorted(totals, key=natural) if len(totals) > len(LABELS) else [label for label, _ in totals.most_common()]
    many = len(members) > 24
    figure, (ax,) = panels(1, width=7.2, height=3.4 if many else 1.4 + 0.26 * len(members))
    ax.set_title("Rows of each client" + (", by label" if len(labels) > 1 else ""))
    if len(labels) > len(LABELS):
        label_map(figure, ax, members, labels)
        return figure
    members = sorted(members, key=lambda m: (m.rank, -m.rows)) if many else members
    parts = [(label, [m.labels.get(label, 0.0) for m in members], c) for label, c in zip(labels, LABELS, strict=False)]
    base = [0.0] * len(members)
    for _, counts, color in parts or [("", [float(member.rows) for member in members], DOWN)]:
        if many:
            ax.bar(range(len(members)), counts, 1.0, base, color=color)
        else:
            ax.barh(range(len(members)), counts, 0.72, base, color=color, ec="white", lw=0.6)
        base = [low + count for low, count in zip(base, counts, strict=True)]
    if many:
        rank_ticks(ax, members)
        ax.set_ylabel("rows")
    else:
        name_ticks(ax, members)
        ax.set_xlabel("rows")
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
        ax.set_xticks(range(len(members)), [f"{short(m.id, 12)}\nrank {m.rank}" for m in members])
    else:
        rank_ticks(ax, members)
    figure.colorbar(image, ax=ax, label="rows", shrink=0.9, pad=0.02).outline.set_visible(False)


def telemetry(story: Story) -> Figure | None:
    """Whatever else was measured, one panel for the numbers of one parent."""
    found: dict[tuple[str, ...], dict[str, Points]] = {}
    for rnd in story.rounds:
        for (*parent, leaf), value in leaves((), rnd.get("telemetry")):
            group = tuple(parent) or (leaf,)
            if group == (SMALLEST,):
                continue  # a picture of its own
            found.setdefault(group, {}).setdefault(leaf, []).append((rnd["round"], value))
    if not found:
        return None
    if errors := found.get(("served_error",)):  # a bias adds up: by now, at most this has been lost
        rounds, values = zip(*errors["served_error"], strict=True)
        errors["summed so far"] = list(zip(rounds, accumulate(values), strict=True))
    groups = list(found.items())[:12]
    figure, axes = panels(len(groups))
    rank_of = {member.id: member.rank for member in story.members}
    colors = colors_of(rank_of.values())
    for ax, (group, curves) in zip(axes, groups, strict=True):
        ax.set_title(TELEMETRY.get(group[0]) or clipped(" / ".join(map(plain, group)), 44))
        by_client = curves.keys() <= rank_of.keys()
        ends: list[tuple[float, str, Any]] = []
        for place, (leaf, points) in enumerate(curves.items()):
            color: Any = colors[rank_of[leaf]] if by_client else LINES[place % len(LINES)]
            line(ax, points, color, width=1.8 if len(curves) <= 10 else 0.8)
            last = metric("loss", points[-1][1])
            ends.append((points[-1][1], f"{short(leaf, 16)} {last}" if len(curves) > 1 else last, color))
        by_round(ax, story)
        if len(ends) <= 10:
            label_ends(ax, ends)
        elif by_client:
            names_above(ax, [(f"rank {rank}", color) for rank, color in colors.items()])
    return figure


TELEMETRY = {
    "served_error": "Served, off the mean of the clients' steps",
    "truncation": "Share of the update beyond rank r",
    "rank": "Rank of the update",
    "singular_values": "Singular values, by place",
    "drift": "How far each client moved",
    "cosine": "Each step's cosine to the mean step",
}
"""Titles of what ``fedllm.telemetry`` measures."""

PLOTS: dict[str, Callable[[Story], Figure | None]] = {
    "learning": learning,
    "clients": clients,
    "data": data,
    "ranks": ranks,
    "traffic": traffic,
    "telemetry": telemetry,
    "conditioning": conditioning,
}
"""Every plot by its file's name."""


def plain(key: str) -> str:
    """A key as words."""
    return key.replace("_", " ")


def short(name: str, most: int) -> str:
    """A name cut in its middle: what tells clients apart is mostly at the end."""
    return name if len(name) <= most else f"{name[: most // 3]}…{name[-(most - most // 3 - 1) :]}"
