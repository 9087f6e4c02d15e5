"""The words of a comparison: its page in Markdown and its CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.reports.compare.cost_to_target import cost_tables
from fedllm.reports.compare.runs import Entry, methods_in, settings_in
from fedllm.reports.compare.significance import LEVEL, Cell, baselines, columns, verdict
from fedllm.reports.formatting import is_fraction, operations, size
from fedllm.reports.markdown import safe, said, table
from fedllm.reports.run_record import at, client_scores, natural


def text(
    entries: Sequence[Entry],
    keys: Sequence[str],
    goal: tuple[str, Mapping[str, float]],
    drawn: Sequence[str],
    left_out: Sequence[str],
) -> str:
    """The comparison in Markdown."""
    parts = ["# Comparison", facts(entries), reading(entries)]
    for key in keys:
        parts += [f"## {said(key).capitalize()}", score_table(entries, key), *verdict_lines(entries, key)]
    pictures = {start: [name for name in drawn if name.startswith(start)] for start in ALT}
    shown = {start: [f"![{ALT[start]}]({name}.png)" for name in names] for start, names in pictures.items()}
    parts += ["## By round and by bytes", *shown["curves"]]
    parts += ["## Cost of a score", *cost_tables(entries, *goal), *shown["trade_off"]]
    parts += [COUNTED] if any(max(entry.computed().values()) for entry in entries) else []
    by = "level" if any(member.level for entry in entries for member in entry.story.members) else "rank"
    told = [*shown["boxes"], *shown["clients"], clients_table(entries, keys[0])]
    parts += [f"## Clients by {by}", *told] if any(told) else []
    parts += ["## Runs", runs_table(entries, keys)]
    parts += ["\n".join(f"- Left out: {safe(why)}" for why in left_out)] if left_out else []
    return "\n\n".join(part for part in parts if part) + "\n"


ALT = {
    "curves": "Scores by round and by bytes moved, mean and range over seeds",
    "trade_off": "The score at the end against bytes moved and FLOPs of training, mean and range over seeds",
    "boxes": "Scores of the clients' own models, a box a rule",
    "clients": "Each client's own model, by rank or level",
}
"""What the pictures show, by the start of their files' names."""

COUNTED = (
    "FLOPs are those of the clients' training as it was done: 2 a multiply-add of convolutions, linear layers and "
    "matrix products, forward and backward, with whatever else a rule runs beside the client's network."
)


def facts(entries: Sequence[Entry]) -> str:
    seeds = sorted({entry.seed for entry in entries})
    rounds = sorted({len(entry.story.rounds) for entry in entries})
    models = dict.fromkeys(str(at(entry.story.recipe, "model", "name") or "?") for entry in entries)
    tasks = dict.fromkeys(str(at(entry.story.recipe, "data", "name") or "?") for entry in entries)
    return " · ".join([
        f"{len(entries)} runs", f"seeds {', '.join(map(str, seeds))}", f"{' or '.join(map(str, rounds))} rounds",
        *(safe(Path(name).name) for name in models), *map(safe, tasks),
    ])  # fmt: skip


def score_table(entries: Sequence[Entry], key: str) -> str:
    """Mean ± standard deviation over seeds; the best rule of a column in bold, a star where it is significant."""
    by = columns(entries, key)
    judged = {setting: verdict(cells, key) for setting, cells in by.items()}
    lines = []
    for method in methods_in(entries):
        line = [safe(method)]
        for setting, cells in by.items():
            told, found = written(cells.get(method), key), judged[setting]
            sure = found is not None and found.p is not None and found.p < LEVEL
            top = {m for m, c in cells.items() if found is not None and c.mean == cells[found.best].mean}
            best = method in top and len(top) < len(cells)
            line.append(f"**{told}**" + "\\*" * sure if best else told)
        lines.append(line)
    under = {s: baselines(entries, s, key) for s in settings_in(e for e in entries if not e.pooled)}
    for name in dict.fromkeys(name for found in under.values() for name in found):
        lines.append([f"_{safe(name)}_", *(written(under[s].get(name) if s in under else None, key) for s in by)])
    unit = "%" if is_fraction(key) else "nats" if "loss" in key else ""
    return table([unit, *(safe(setting or "mean ± std") for setting in by)], lines)


def written(found: Cell | None, key: str) -> str:
    """``mean ± std``, percent where the score is a share."""
    if found is None:
        return "–"
    scale, digits = (100, 1) if is_fraction(key) else (1, 3)
    spread = "" if found.std is None else f" ± {scale * found.std:.{digits}f}"
    return f"{scale * found.mean:.{digits}f}{spread}"


def verdict_lines(entries: Sequence[Entry], key: str) -> list[str]:
    """What stands behind each bold number, in words."""
    lines = []
    for setting, cells in columns(entries, key).items():
        found = verdict(cells, key)
        if found is None:
            continue
        gap = f"{100 * found.gap:+.1f} points" if is_fraction(key) else f"{found.gap:+.3f}"
        how = found.test if found.p is None else f"{found.test}, p = {found.p:.2g}"
        ends = "" if found.p is None else ", significant" if found.p < LEVEL else ", not significant"
        start = f"{safe(setting)}: " if setting else ""
        told = f"{gap} ({how}){ends}" if found.gap else "the same"
        lines.append(f"- {start}{safe(found.best)} against {safe(found.second)}: {told}.")
    return ["\n".join(lines)] if lines else []


def reading(entries: Sequence[Entry]) -> str:
    """How the tables are to be read, and how far they can be trusted."""
    most = max((len({e.seed for e in entries if e.method == method}) for method in methods_in(entries)), default=0)
    notes = [
        f"Rules first, the best in bold, \\* where it beats the runner-up at p < {LEVEL}; baselines below, in italics. "
        "± is the standard deviation over seeds (n - 1). The runner-up is chosen "
        "after looking, and p is not corrected for it."
    ]
    if most < 5:
        notes.append(
            f"With {most} seed{'s' * (most != 1)} a test has next to no power: what is not significant here may well "
            "be real, and the order of the rules may be chance."
        )
    return " ".join(notes)


def clients_table(entries: Sequence[Entry], key: str) -> str:
    """Mean score of the clients of a rank or level, each with its own model after its last round, or trained alone."""
    kinds = kinds_of(entries)[::-1]
    lines = []
    for method in methods_in(entries):
        for kind, words in (("own", "each client's own model"), ("alone", "each client alone")):
            group = [e for e in entries if e.method == method and not e.pooled]
            found = [pair for e in group for pair in client_scores(e.story, kind, key).items()]
            if found:
                of = [Cell(dict(enumerate(v for member, v in found if member.kind == name))) for name in kinds]
                lines.append([f"{safe(method)}, {words}", *(written(c, key) if c.values else "–" for c in of)])
    head = [f"{said(key)}, over clients and seeds", *(safe(kind) or "all" for kind in kinds)]
    return table(head, lines) if lines else ""


def kinds_of(entries: Sequence[Entry]) -> list[str]:
    """Ranks or levels of the clients of all runs, the weakest first."""
    members = {member for e in entries if not e.pooled for member in e.story.members}
    ordered = sorted(members, key=lambda member: (member.rank, natural(member.level)))
    return list(dict.fromkeys(member.kind for member in ordered))


def runs_table(entries: Sequence[Entry], keys: Sequence[str]) -> str:
    head = ["run", "rule", "setting", "seed", *map(said, keys), "moved", "FLOPs", "seconds"]
    lines = []
    for entry in entries:
        scores = [f"{100 * entry.final[k]:.1f}%" if is_fraction(k) else f"{entry.final[k]:.3f}" for k in keys]
        seconds = sum(value for _, value in entry.story.curve("seconds"))
        spent = [size(max(entry.moved().values())), operations(max(entry.computed().values()))]
        names = [safe(entry.run.name), safe(entry.method), safe(entry.setting) or "–", str(entry.seed)]
        lines.append([*names, *scores, *spent, f"{seconds:.0f}"])
    return table(head, lines)


def aggregated_csv(entries: Sequence[Entry], keys: Sequence[str]) -> str:
    rows: list[list[Any]] = [
        ["metric", "setting", "method", "mean", "std", "seeds", "best", "p_against_runner_up", "test"]
    ]
    settings = settings_in(e for e in entries if not e.pooled)
    for key in keys:
        for setting, cells in columns(entries, key).items():
            found = verdict(cells, key)
            for method, c in cells.items():
                best = bool(found and found.best == method)
                judged = [found.p, found.test] if found and best else ["", ""]
                rows.append([key, setting, method, c.mean, c.std, len(c.values), best, *judged])
            for name, c in baselines(entries, setting, key).items() if setting in settings else ():
                rows.append([key, setting, name, c.mean, c.std, len(c.values), "", "", ""])
    return as_csv(rows)


def runs_csv(entries: Sequence[Entry], keys: Sequence[str]) -> str:
    rows: list[list[Any]] = [
        ["run", "method", "setting", "seed", "pooled", "rounds", *keys, "bytes", "flops", "seconds"]
    ]
    for e in entries:
        seconds = sum(value for _, value in e.story.curve("seconds"))
        scores = [e.final[key] for key in keys]
        rounds = len(e.story.rounds)
        spent = [max(e.moved().values()), max(e.computed().values()), seconds]
        rows.append([e.run.name, e.method, e.setting, e.seed, e.pooled, rounds, *scores, *spent])
    return as_csv(rows)


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([["" if v is None else v for v in row] for row in rows])
    return stream.getvalue()
