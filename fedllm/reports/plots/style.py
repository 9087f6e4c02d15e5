"""What every plot is made of: style, panels, lines, words at the lines they name.

Colours say rank or level wherever clients appear (dark for small, bright for large). Figures are made without pyplot,
whose list of figures every caller would share.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fedllm.reports.formatting import size
from fedllm.reports.run_record import Points, Story
from fedllm.storage import files

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


@contextmanager
def styled() -> Iterator[None]:
    """Our style, and no word about letters that the font lacks."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save(figure: Figure, place: Path) -> None:
    FigureCanvasAgg(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format=place.suffix[1:])
    files.write(place, drawn.getvalue())


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
        whole(axes.xaxis)
    axes.set_xlabel("round")


def whole(axis: Axis) -> None:
    """Ticks at whole numbers only, for what is counted."""
    axis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))


def rounds_of(curves: Iterable[Points]) -> list[int]:
    """The rounds in which any of the curves has a value."""
    return sorted({index for points in curves for index, _ in points})


def complete(curves: Iterable[Points]) -> bool:
    """Whether every curve has a value in the same rounds; where clients sit out, a line each is a heap of scraps."""
    return len({tuple(index for index, _ in points) for points in curves}) == 1


def pieces(points: Points, rounds: Sequence[int]) -> list[Points]:
    """The points, parted where one of ``rounds`` lies between two of them: no line says what was not measured."""
    if not rounds:
        return [points]
    places = {index: place for place, index in enumerate(rounds)}
    parted = groupby(enumerate(points), key=lambda numbered: places[numbered[1][0]] - numbered[0])
    return [[point for _, point in piece] for _, piece in parted]


def line(
    axes: Axes,
    points: Points,
    color: Any,
    width: float = 2.0,
    alpha: float = 1.0,
    dots: bool | None = None,
    rounds: Sequence[int] = (),
) -> None:
    """A curve, with a dot at each point where there are few.

    Args:
        rounds: those in which there could have been a point; where there is none the curve has a gap.
    """
    few = len(points) <= 12 if dots is None else dots
    dot = 7.0 if len(points) == 1 and len(rounds) < 2 else 2.2 + width
    for piece in pieces(points, rounds):
        x, y = [index for index, _ in piece], [value for _, value in piece]
        mark = "o" if few or len(piece) == 1 else None
        axes.plot(x, y, color=color, lw=width, alpha=alpha, marker=mark, ms=dot, mec="white", mew=0.6)


def kind_lines(axes: Axes, story: Story, curves: Mapping[str, Points]) -> list[tuple[float, str, Any]]:
    """The mean of the clients of each rank or level, in a band from the least to the most of them; words for the ends.

    Args:
        curves: by client.
    """
    rounds, colors = rounds_of(curves.values()), colors_of(member.kind for member in story.members)
    ends, spread = [], False
    for kind, group in story.by_kind().items():
        inside = [points for member in group if (points := curves.get(member.id))]
        if not inside:
            continue
        middle, low, high = merged(inside, fmean), dict(merged(inside, min)), dict(merged(inside, max))
        for piece in pieces(middle, rounds):
            x = [index for index, _ in piece]
            reach = [low[index] for index in x], [high[index] for index in x]
            axes.fill_between(x, *reach, color=colors[kind], alpha=0.15, lw=5.0 * (len(x) == 1))
        line(axes, middle, colors[kind], rounds=rounds)
        ends.append((middle[-1][1], kind or "mean", colors[kind]))
        spread |= any(high[index] - low[index] > 0.01 * abs(value) for index, value in middle)
    if spread:
        axes.set_ylabel(f"{axes.get_ylabel()}\n(mean; band: from least to most)")
    return ends


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, Any]], height: float = 3.1) -> None:
    """Words at the right edge, each at its own height and pushed apart where they would overlap.

    Args:
        labels: the value where each belongs, its words, its colour.
        height: of the panel in inches.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap = 11 / (72 * height * 0.72)
    upwards = axes.transScale + axes.transLimits
    spots: list[float] = []
    ordered = sorted(labels, key=lambda label: label[0])
    for value, _, _ in ordered:
        spot = min(1.0, max(0.0, float(upwards.transform((1.0, value))[1])))
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


def colors_of(kinds: Iterable[str]) -> dict[str, Any]:
    """Ranks and levels come in order, so their colours are: from dark to bright, and no yellow on white."""
    ordered = list(dict.fromkeys(kinds))
    scale = matplotlib.colormaps["viridis"]
    return {kind: scale(0.78 * place / max(1, len(ordered) - 1)) for place, kind in enumerate(ordered)}


def percents(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def in_decades(axes: Axes) -> None:
    """A logarithmic axis, its numbers written out; what is zero lies below it."""
    low, high = axes.dataLim.minposy, axes.dataLim.y1
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def in_bytes(ax: Axes, names: Sequence[tuple[str, Any]]) -> None:
    names_above(ax, names)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))


def merged(curves: Iterable[Points], how: Callable[[list[float]], float]) -> Points:
    """One curve out of many: at each round, of those that have a value there."""
    found: dict[int, list[float]] = {}
    for points in curves:
        for index, value in points:
            found.setdefault(index, []).append(value)
    return [(index, how(values)) for index, values in sorted(found.items())]


def plain(key: str) -> str:
    """A key as words."""
    return key.replace("_", " ")


def short(name: str, most: int) -> str:
    """A name cut in its middle: what tells clients apart is mostly at the end."""
    return name if len(name) <= most else f"{name[: most // 3]}…{name[-(most - most // 3 - 1) :]}"


def boxes(ax: Axes, groups: Mapping[str, Sequence[float]], colors: Sequence[Any]) -> None:
    """One box a group from quartile to quartile, its median as a line and its mean as ``+``, every value over it."""
    drawn = ax.boxplot(
        list(groups.values()), positions=range(len(groups)), widths=0.55, showfliers=False, showmeans=True,
        patch_artist=True, medianprops={"color": INK, "lw": 1.4}, whiskerprops={"color": GREY},
        capprops={"color": GREY},
        meanprops={"marker": "+", "markeredgecolor": INK, "markersize": 9, "markeredgewidth": 1.4, "zorder": 4},
    )  # fmt: skip
    for place, (box, values, color) in enumerate(zip(drawn["boxes"], groups.values(), colors, strict=True)):
        box.set(facecolor=color, alpha=0.25, edgecolor=color)
        spread = [place + 0.4 * ((at + 0.5) / len(values) - 0.5) for at in range(len(values))]
        ax.plot(spread, values, ls="", marker="o", ms=4, color=color, alpha=0.75, mec="white", mew=0.4, zorder=3)
    ax.set_xticks(range(len(groups)), [short(name, 14) for name in groups])
    ax.set_xlim(-0.6, len(groups) - 0.4)
    if sum(len(short(name, 14)) for name in groups) > 48:  # side by side they would overlap
        ax.tick_params(axis="x", rotation=30)
