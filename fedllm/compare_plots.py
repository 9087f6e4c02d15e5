"""The pictures of a comparison: curves by round and by bytes, and the clients' own scores by rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fedllm.compare import Entry, baselines, client_scores, pooled_for
from fedllm.plots import DPI, GREY, INK, LINES, STYLE, label_ends, panels, percents, plain, short
from fedllm.progress import is_fraction, metric, size
from fedllm.story import course_of

Curve = Mapping[float, Sequence[float]]
"""By round, or by bytes: one value a seed."""

HEIGHT = 3.3


def draw(entries: Sequence[Entry], keys: Sequence[str], out: Path) -> list[str]:
    """Writes what there is to show; the names of the files, without suffix. Those of an earlier call are removed."""
    for old in [*out.glob("curves*.png"), out / "clients.png"]:
        old.unlink(missing_ok=True)
    federated = [entry for entry in entries if not entry.pooled]
    settings = list(dict.fromkeys(entry.setting for entry in federated))
    colors = colors_of(entries)
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        for number, setting in enumerate(settings):
            name = "curves" if len(settings) == 1 else f"curves_{number + 1}_{slug(setting)}"
            figure = curves(
                [*(e for e in federated if e.setting == setting), *pooled_for(entries, setting)], keys, setting, colors
            )
            if figure is not None:
                figures[name] = figure
        figure = clients(federated, keys, colors)
        if figure is not None:
            figures["clients"] = figure
        for name, figure in figures.items():
            FigureCanvasAgg(figure)
            figure.savefig(out / f"{name}.png", dpi=DPI)
    return list(figures)


def titled(key: str) -> str:
    return "Held-out loss" if key == "loss" else plain(key).capitalize()


def slug(words: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", words).strip("_")[:40] or "all"


def colors_of(entries: Sequence[Entry]) -> dict[str, Any]:
    """Rules in colours, the pooled baseline in grey."""
    methods = list(dict.fromkeys(entry.method for entry in entries if not entry.pooled))
    return {name: LINES[place % len(LINES)] for place, name in enumerate(methods)}


def dashes(names: Iterable[str]) -> dict[str, str]:
    """The line of each rule: rules that have to share a colour differ in this."""
    return {name: ("-", "-.", ":")[place // len(LINES) % 3] for place, name in enumerate(names)}


def curves(entries: Sequence[Entry], keys: Sequence[str], setting: str, colors: Mapping[str, Any]) -> Figure | None:
    """Training loss, held-out loss and the first score by round, and the held-out loss (or the score) by bytes."""
    loss = course_of(keys)
    several = max(len(entry.story.curve("eval", keys[0])) for entry in entries) > 1
    if not several:  # evaluated once: the training loss is all that has a course
        asked: list[tuple[str, tuple[str, ...], bool]] = [("Training loss", ("train_loss",), False)]
    else:
        asked = [(titled(loss), ("eval", loss), False)] if loss else [("Training loss", ("train_loss",), False)]
        asked += [(titled(keys[0]), ("eval", keys[0]), False)] if keys[0] != loss else []
        best = loss or keys[0]
        asked += [(f"{titled(best)} by bytes moved", ("eval", best), True)]
    if not any(entry.story.curve(*path) for _, path, _ in asked for entry in entries):
        return None
    figure, axes = panels(len(asked), width=5.0, height=HEIGHT)
    if setting:
        figure.suptitle(setting, x=0.01, ha="left", fontsize=10)
    for ax, (title, path, by_bytes) in zip(axes, asked, strict=True):
        ax.set_title(title)
        panel(ax, entries, path, by_bytes, colors)
    return figure


def panel(ax: Axes, entries: Sequence[Entry], path: tuple[str, ...], by_bytes: bool, colors: Mapping[str, Any]) -> None:
    """One line a method: the mean over seeds, and a band from the least to the most."""
    key = path[-1]
    ends: list[tuple[float, str, Any]] = []
    styles = dashes(colors)
    groups = {name: [e for e in entries if e.method == name and not e.pooled] for name in colors}
    pooled = [e for e in entries if e.pooled]
    for name, group in [*groups.items(), *([("all data in one place", pooled)] if pooled and not by_bytes else [])]:
        found = merged(group, path, by_bytes)
        if not found:
            continue
        color, style = (colors[name], styles[name]) if name in colors else (GREY, "--")
        x = sorted(found)
        middle = [fmean(found[at]) for at in x]
        if any(len(found[at]) > 1 for at in x):
            ax.fill_between(
                x, [min(found[at]) for at in x], [max(found[at]) for at in x], color=color, alpha=0.12, lw=0
            )
        dots = "o" if len(x) <= 12 else None
        ax.plot(x, middle, color=color, ls=style, lw=1.8, marker=dots, ms=4, mec="white", mew=0.6)
        ends.append((middle[-1], f"{short(name, 24)} {metric(key, middle[-1])}", color))
    base = base_value(entries, key) if path[0] == "eval" and not by_bytes and is_fraction(key) else None
    if base is not None:
        ax.axhline(base, color=INK, lw=1.0, ls=":", zorder=1)
        ends.append((base, f"base model {metric(key, base)}", INK))
    finish(ax, key, by_bytes)
    label_ends(ax, ends, height=HEIGHT)


def finish(ax: Axes, key: str, by_bytes: bool) -> None:
    if by_bytes:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(LogFew())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value).replace(".0 ", " ")))
        ax.set_xlabel("bytes, down and up")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
        ax.set_xlabel("round")
    if is_fraction(key):
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        percents(ax.yaxis)
        ax.set_ylabel("of the held-out rows")
    else:
        ax.set_ylabel("cross-entropy, nats" if "loss" in key else plain(key))


class LogFew(MaxNLocator):
    """At most four round values on a logarithmic axis, wherever a power of ten may lie."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        low, high = max(min(vmin, vmax), 1.0), max(vmin, vmax, 1.0)
        ladder = [m * 10.0**p for p in range(16) for m in (1, 2, 5)]
        inside = [value for value in ladder if low <= value <= high]
        return np.asarray(inside[:: -(-len(inside) // 4)] if inside else [low])


def merged(group: Sequence[Entry], path: tuple[str, ...], by_bytes: bool) -> Curve:
    """The values of all seeds at each round; by bytes, at the mean of what the seeds moved until then."""
    found: dict[int, list[float]] = {}
    moved: dict[int, list[float]] = {}
    for entry in group:
        bytes_at = entry.moved()
        for index, value in entry.story.curve(*path):
            found.setdefault(index, []).append(value)
            moved.setdefault(index, []).append(bytes_at[index])
    whole = {index: values for index, values in found.items() if len(values) == len(group)}
    return {fmean(moved[index]) if by_bytes else float(index): values for index, values in whole.items()}


def base_value(entries: Sequence[Entry], key: str) -> float | None:
    settings = [entry.setting for entry in entries if not entry.pooled]
    found = baselines(entries, settings[0] if settings else "", key).get("base model")
    return None if found is None else found.mean


def clients(entries: Sequence[Entry], keys: Sequence[str], colors: Mapping[str, Any]) -> Figure | None:
    """Scores of the clients' own models by rank, and of those that trained alone."""
    shown = [key for key in (keys[0], course_of(keys)) if key]
    shown = [
        k for k in dict.fromkeys(shown) if any(client_scores(e.story, w, k) for e in entries for w in ("own", "alone"))
    ]
    if not shown:
        return None
    ranks = sorted({member.rank for entry in entries for member in entry.story.members})
    figure, axes = panels(len(shown), width=5.4, height=HEIGHT)
    for ax, key in zip(axes, shown, strict=True):
        ax.set_title(f"{titled(key)} of the clients, by rank")
        ends: list[tuple[float, str, Any]] = []
        groups = [(name, [e for e in entries if e.method == name], "own", "-", color) for name, color in colors.items()]
        groups.append(("alone", list(entries), "alone", ":", INK))
        for place, (name, group, kind, style, color) in enumerate(groups):
            by: dict[int, list[float]] = {}
            for entry in group:
                for rank, value in client_scores(entry.story, kind, key):
                    by.setdefault(rank, []).append(value)
            if not by:
                continue
            shift = 0.06 * (place - (len(groups) - 1) / 2)
            x = [ranks.index(rank) + shift for rank in sorted(by)]
            for at, rank in zip(x, sorted(by), strict=True):
                ax.plot([at] * len(by[rank]), by[rank], ls="", marker="o", ms=3.5, color=color, alpha=0.45, mew=0)
            middle = [fmean(by[rank]) for rank in sorted(by)]
            ax.plot(x, middle, color=color, ls=style, lw=1.8, marker="_" if len(x) == 1 else None, ms=16, mew=2)
            told = "each client alone" if kind == "alone" else name
            ends.append((middle[-1], f"{short(told, 24)} {metric(key, middle[-1])}", color))
        ax.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
        ax.set_xlim(-0.4, len(ranks) - 0.6)
        ax.set_xlabel("rank")
        if is_fraction(key):
            percents(ax.yaxis)
            ax.set_ylabel("of the held-out rows")
        else:
            ax.set_ylabel("cross-entropy, nats" if "loss" in key else plain(key))
        label_ends(ax, ends, height=HEIGHT)
    return figure
