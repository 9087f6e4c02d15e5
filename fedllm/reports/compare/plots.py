"""The pictures of a comparison: curves by round and bytes, what a score costs, and the clients' own models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fedllm.reports.compare.runs import Entry, settings_in
from fedllm.reports.compare.significance import baselines, pooled_for
from fedllm.reports.compare.tables import ALT, kinds_of
from fedllm.reports.formatting import is_fraction, metric, operations, size
from fedllm.reports.plots.style import (
    GREY,
    INK,
    LINES,
    boxes,
    inked,
    label_ends,
    panels,
    percents,
    plain,
    save,
    short,
    styled,
)
from fedllm.reports.run_record import client_scores, clipped, course_of

Curve = Mapping[float, Sequence[float]]
"""By round, or by bytes: one value a seed."""

HEIGHT = 3.3


def draw(entries: Sequence[Entry], keys: Sequence[str], out: Path) -> list[str]:
    """Writes what there is to show; the names of the files, without suffix. Those of an earlier call are removed."""
    for old in [path for start in ALT for path in out.glob(f"{start}*.png")]:
        old.unlink()
    federated = [entry for entry in entries if not entry.pooled]
    settings = list(dict.fromkeys(entry.setting for entry in federated))
    colors = colors_of(entries)
    figures: dict[str, Figure | None] = {}
    with styled():
        for number, setting in enumerate(settings):
            part = "" if len(settings) == 1 else f"_{number + 1}_{slug(setting)}"
            ours = [entry for entry in federated if entry.setting == setting]
            figures[f"curves{part}"] = curves([*ours, *pooled_for(entries, setting)], keys, setting, colors)
            figures[f"trade_off{part}"] = trade_off(ours, keys[0], setting, colors)
        figures |= {"boxes": own(federated, keys, colors), "clients": clients(federated, keys, colors)}
        drawn = {name: figure for name, figure in figures.items() if figure is not None}
        for name, figure in drawn.items():
            save(figure, out / f"{name}.png")
    return list(drawn)


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
        in_decades(ax, size)
        ax.set_xlabel("bytes, down and up")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
        ax.set_xlabel("round")
    if is_fraction(key):
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    as_score(ax, key)


def as_score(ax: Axes, key: str) -> None:
    """The vertical axis of a score."""
    if is_fraction(key):
        percents(ax.yaxis)
        ax.set_ylabel("of the held-out rows")
    else:
        ax.set_ylabel("cross-entropy, nats" if "loss" in key else plain(key))


def in_decades(ax: Axes, unit: Callable[[float], str]) -> None:
    """A logarithmic horizontal axis of bytes or operations."""
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(LogFew())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value).replace(".0 ", " ")))


class LogFew(MaxNLocator):
    """At most four round values on a logarithmic axis, wherever a power of ten may lie."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        low, high = max(min(vmin, vmax), 1.0), max(vmin, vmax, 1.0)
        ladder = [m * 10.0**p for p in range(24) for m in (1, 2, 5)]
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
    """Scores of the clients' own models by rank or level, and of those that trained alone."""
    shown = [key for key in (keys[0], course_of(keys)) if key]
    shown = [
        k for k in dict.fromkeys(shown) if any(client_scores(e.story, w, k) for e in entries for w in ("own", "alone"))
    ]
    kinds = kinds_of(entries)
    if not shown or not any(kinds):
        return None
    by = "level" if any(member.level for entry in entries for member in entry.story.members) else "rank"
    figure, axes = panels(len(shown), width=5.4, height=HEIGHT)
    for ax, key in zip(axes, shown, strict=True):
        ax.set_title(f"{titled(key)} of the clients, by {by}")
        ends: list[tuple[float, str, Any]] = []
        groups = [(name, [e for e in entries if e.method == name], "own", "-", color) for name, color in colors.items()]
        groups.append(("each client alone", list(entries), "alone", ":", INK))
        for place, (name, group, kind, style, color) in enumerate(groups):
            found = [pair for entry in group for pair in client_scores(entry.story, kind, key).items()]
            of = {k: [value for member, value in found if member.kind == k] for k in kinds}
            of = {k: values for k, values in of.items() if values}
            if not of:
                continue
            shift = 0.06 * (place - (len(groups) - 1) / 2)
            x = [kinds.index(k) + shift for k in of]
            for at, values in zip(x, of.values(), strict=True):
                ax.plot([at] * len(values), values, ls="", marker="o", ms=3.5, color=color, alpha=0.45, mew=0)
            middle = [fmean(values) for values in of.values()]
            ax.plot(x, middle, color=color, ls=style, lw=1.8, marker="_" if len(x) == 1 else None, ms=16, mew=2)
            ends.append((middle[-1], f"{short(name, 24)} {metric(key, middle[-1])}", color))
        ax.set_xticks(range(len(kinds)), kinds)
        ax.set_xlim(-0.4, len(kinds) - 0.6)
        as_score(ax, key)
        label_ends(ax, ends, height=HEIGHT)
    return figure


def own(entries: Sequence[Entry], keys: Sequence[str], colors: Mapping[str, Any]) -> Figure | None:
    """The first score of the clients' own models: a box a rule, every client of every seed over it."""
    key = next((k for k in keys if is_fraction(k) and any(client_scores(e.story, "own", k) for e in entries)), None)
    if key is None:
        return None
    scores = {
        setting: {
            name: [value for e in entries if (e.method, e.setting) == (name, setting) for value in of(e, key)]
            for name in colors
        }
        for setting in settings_in(entries)
    }
    figure, axes = panels(len(scores), width=max(4.6, 1.6 + 0.6 * len(colors)), height=3.6)
    for ax, (setting, by) in zip(axes, scores.items(), strict=True):
        known = {name: values for name, values in by.items() if values}
        score = plain(key).removeprefix("own ").capitalize()
        ax.set_title(clipped(setting, 40) or f"{score} of the clients' own models")
        boxes(ax, known, [colors[name] for name in known])
        as_score(ax, key)
    return figure


def of(entry: Entry, key: str) -> list[float]:
    return list(client_scores(entry.story, "own", key).values())


def trade_off(entries: Sequence[Entry], key: str, setting: str, colors: Mapping[str, Any]) -> Figure | None:
    """The score after the last round against the bytes moved and the FLOPs of training until then: a point a rule."""
    spent = [("bytes, down and up", size, lambda e: max(e.moved().values()))]
    spent += [("FLOPs of training", operations, lambda e: max(e.computed().values()))]
    spent = [(title, unit, cost) for title, unit, cost in spent if any(cost(e) for e in entries)]
    if not spent:
        return None
    figure, axes = panels(len(spent), width=5.4, height=HEIGHT)
    if setting:
        figure.suptitle(setting, x=0.01, ha="left", fontsize=10)
    for ax, (title, unit, cost) in zip(axes, spent, strict=True):
        ax.set_title(f"{plain(key).capitalize()} and {title}")
        groups = {name: [e for e in entries if e.method == name] for name in colors}
        points = {n: (fmean(map(cost, group)), [e.final[key] for e in group]) for n, group in groups.items() if group}
        free = {name: fmean(y) for name, (x, y) in points.items() if not x}  # a logarithm has no place for 0
        points = {name: point for name, point in points.items() if name not in free}
        for name, height in free.items():
            ax.axhline(height, color=colors[name], lw=1.2, ls=":")
            where: dict[str, Any] = {"xy": (0.02, height), "xycoords": ax.get_yaxis_transform(), "xytext": (0, 2)}
            ax.annotate(
                f"{short(name, 20)}: none", textcoords="offset points", fontsize=8, color=inked(colors[name]), **where
            )
        for name, (x, y) in points.items():
            ax.plot([x, x], [min(y), max(y)], color=colors[name], lw=1.4)
            ax.plot([x], [fmean(y)], ls="", marker="o", ms=7, color=colors[name], mec="white", mew=0.8)
        if max(x for x, _ in points.values()) > 10 * min(x for x, _ in points.values()):
            in_decades(ax, unit)
        else:
            ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: unit(value)))
        ax.margins(x=0.12, y=0.15)
        named(ax, {name: (x, fmean(y)) for name, (x, y) in points.items()}, colors)
        ax.set_xlabel(title)
        as_score(ax, key)
    return figure


def named(ax: Axes, points: Mapping[str, tuple[float, float]], colors: Mapping[str, Any]) -> None:
    """Names beside points, towards the middle of the panel; one that would lie on another gives way downwards."""
    ax.autoscale_view()
    gap = 11 / (72 * HEIGHT * 0.72)
    taken: list[tuple[float, float]] = []
    for name, point in sorted(points.items(), key=lambda pair: -pair[1][1]):
        x, y = ax.transAxes.inverted().transform(ax.transData.transform(point))
        side = 1 if x < 0.5 else -1
        spot = min([y, *(other - gap for at, other in taken if abs(at - x) < 0.2)])
        taken.append((x, spot))
        ax.text(
            x + 0.02 * side, spot, short(name, 20), transform=ax.transAxes, fontsize=8, color=inked(colors[name]),
            ha="left" if side > 0 else "right", va="center",
        )  # fmt: skip
