"""A run's folder told to a person: ``report.md`` and its plots, from the folder's own files and nothing else.

Text from the files is shown as text, whatever it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm.reports.formatting import is_fraction, metric, number, operations, size, span
from fedllm.reports.markdown import code, safe, said, table
from fedllm.reports.plots.run import draw
from fedllm.reports.run_record import (
    Member,
    Story,
    at,
    base_row,
    client_scores,
    clipped,
    lower_is_better,
    map_numbers,
    mapping,
    own_keys,
    read,
    rows_of,
)
from fedllm.storage import files


def write(run: Path) -> Path:
    """Writes ``report.md`` and ``plots/*.png`` into a run's folder, over those of an earlier call.

    Returns:
        The path of the report.

    Raises:
        FedError: the folder has no record of a round.
    """
    story = read(run)
    drawn = [*draw(story, run / "plots"), *(name for name in ASKED if (run / "plots" / f"{name}.png").is_file())]
    path = run / "report.md"
    files.write(path, text(story, drawn))
    return path


def text(story: Story, drawn: Sequence[str]) -> str:
    """The report in Markdown."""
    served = bool(story.curve("telemetry", "served_error"))
    sections = [
        ("", [f"# {safe(str(story.summary.get('title') or story.name))}", facts(story)]),
        (
            "Result",
            [
                *(summary_table(story.summary), gain(story.summary), *notes(story.summary)),
                *(picture("learning", drawn), TIMES * bool(story.curve("train_loss") and story.curve("eval", "loss"))),
            ],
        ),
        ("Who trained what", [*who(story), picture("data", drawn), picture("clients", drawn)]),
        ("Clients' own models", [own_table(story), picture("own", drawn), picture("tsne", drawn)]),
        ("Weights and truncation", [picture("ranks", drawn)]),
        ("Rounds", [rounds_table(story), skipped(story)]),
        ("Refused updates", [remarks(story, "refused")]),
        ("Averaged, but odd", [remarks(story, "suspect")]),
        ("Bytes", [picture("traffic", drawn)]),
        ("Telemetry", [picture("telemetry", drawn), IDEAL * served, picture("conditioning", drawn)]),
        ("Settings", [settings(story.recipe)]),
        ("Command", [command(story.recipe)]),
    ]
    written = []
    for title, parts in sections:
        told = [part for part in parts if part]
        written += [f"## {title}"] * bool(title and told) + told
    return "\n\n".join(written) + "\n"


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key, _ in map_numbers(row) if key != "name"))


def best_of(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The best value of a column, None where all look the same or there is no better and worse."""
    values = [value for row in rows if (value := number(row.get(key))) is not None]
    if len({metric(key, value) for value in values}) < 2 or not (lower_is_better(key) or is_fraction(key)):
        return None
    return min(values) if lower_is_better(key) else max(values)


def summary_table(summary: Mapping[str, Any]) -> str:
    """The models side by side in Markdown, the best of each column in bold; empty where there are none."""
    rows = rows_of(summary)
    columns = columns_of(rows)
    best = {key: best_of(rows, key) for key in columns}
    cells = []
    for row in rows:
        values = [(key, number(row.get(key))) for key in columns]
        shown = ["–" if v is None else f"**{metric(k, v)}**" if v == best[k] else metric(k, v) for k, v in values]
        cells.append([safe(str(row.get("name", ""))), *shown])
    return table(["", *map(said, columns)], cells) if rows else ""


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """The same on a terminal, with the notes below."""
    rows = rows_of(summary)
    columns = columns_of(rows)
    best = {key: best_of(rows, key) for key in columns}
    shown = Table(title=Text(str(summary.get("title", ""))), title_justify="left", title_style="bold")
    shown.add_column("")
    for key in columns:
        shown.add_column(Text(said(key)), justify="right")
    for row in rows:
        values = [(key, number(row.get(key))) for key in columns]
        cells = [
            Text("-" if v is None else metric(k, v), style="bold green" if v is not None and v == best[k] else "")
            for k, v in values
        ]
        shown.add_row(Text(str(row.get("name", ""))), *cells)
    if rows:
        console.print(shown)
    for note in notes_of(summary):
        console.print(Text(note))


def facts(story: Story) -> str:
    """The run in one line."""
    ranks = sorted({member.rank for member in story.members if member.rank})
    levels = list(dict.fromkeys(member.level for member in story.members if member.level))
    clients = f"{len(story.members)} client{'s' * (len(story.members) != 1)}"
    if 0 < story.took_part < len(story.members):
        clients = f"{story.took_part} of {clients} took part,"
    if levels:
        clients += f" of level {safe(', '.join(levels))}"
    elif ranks:
        clients += f" of rank {ranks[0]}" if len(ranks) == 1 else f" of ranks {ranks[0]} to {ranks[-1]}"
    named = [at(story.recipe, part, "name") for part in ("algorithm", "model", "data")]
    parts = [f"{len(story.rounds)} round{'s' * (len(story.rounds) != 1)}", clients.removesuffix(",")]
    parts += [f"`{code(str(name))}`" for name in named if name]
    seconds = sum(value for _, value in story.curve("seconds"))
    parts += [f"in {span(seconds)}"] if seconds else []
    for key, word in (("bytes_down", "down"), ("bytes_up", "up")):
        moved = sum(value for _, value in story.curve(key))
        parts += [f"{size(moved)} {word}"] if moved else []
    computed = sum(value for _, value in story.curve("flops"))
    parts += [f"{operations(computed)}FLOP of training"] if computed else []
    return " · ".join(parts)


def gain(summary: Mapping[str, Any]) -> str:
    """What the federation gained over the base model, in points and in loss."""
    rows = rows_of(summary)
    base = base_row(summary)
    ours = next((row for row in rows if str(row.get("name", "")).lower().startswith("federated")), None)
    if not base or ours is None:
        return ""
    gains = []
    for key in columns_of([ours]):
        before, after = number(base.get(key)), number(ours.get(key))
        if before is None or after is None or not (is_fraction(key) or lower_is_better(key)):
            continue
        change = 100 * (after - before) if is_fraction(key) else after - before
        gains.append(f"{said(key)} {change:+.1f} points" if is_fraction(key) else f"{said(key)} {change:+.3f}")
    return f"Federated against the {safe(str(base.get('name', 'base model')))}: {', '.join(gains)}." if gains else ""


def notes_of(summary: Mapping[str, Any]) -> list[str]:
    found = summary.get("notes")
    return [str(note) for note in found] if isinstance(found, list) else []


def notes(summary: Mapping[str, Any]) -> list[str]:
    return ["\n".join(f"- {safe(note)}" for note in notes_of(summary))]


def who(story: Story) -> list[str]:
    """What every rank or level did, and behind a fold what every client did."""
    if not story.members:
        return []
    partition = story.partition
    dealt = []
    if partition.get("kind"):
        dealt.append(f"Data split: {safe(str(partition['kind']))}")
    dealt += [f"seed {partition['seed']}"] if number(partition.get("seed")) is not None else []
    for key, fate in (
        ("dropped_rows", "cut off by max_length"),
        ("cut_rows", "without the end of their completion"),
        ("undealt_rows", "dealt to nobody"),
    ):
        count = number(partition.get(key))
        dealt += [f"{metric('rows', count)} rows {fate}"] if count else []
    each = [done(story, member) for member in story.members]
    by = story.by_kind()
    kind = "level" if any(member.level for member in story.members) else "rank"
    head = ["", kind, "rows", "rounds", "steps", "tokens", "weight", "last loss", "down", "up"]
    lines = [[safe(d.name), safe(str(getattr(m, kind))), *d.cells()] for m, d in zip(story.members, each, strict=True)]
    grouped = [
        [f"{len(group)} of {safe(name)}".removesuffix(" of "), *together([done(story, m) for m in group]).cells()]
        for name, group in by.items()
    ]
    full = table(head, lines)
    labels = [[safe(m.id), mix(m)] for m in story.members if m.labels]
    folded = [f"<details><summary>Every client</summary>\n\n{full}\n\n</details>"] if len(lines) > 12 else [full]
    if labels:
        folded.append(f"<details><summary>Label mix</summary>\n\n{table(['', 'labels'], labels)}\n\n</details>")
    if len(lines) > 12:
        folded.insert(0, table(["clients", *head[2:]], grouped))
    return [", ".join(dealt) + "." if dealt else "", *folded]


@dataclass(frozen=True)
class Done:
    """What a client, or all of a kind, did in the run; sums, but for the means of weight and loss."""

    name: str
    rows: float
    rounds: int
    steps: float
    tokens: float
    weight: float | None
    loss: float | None
    down: float
    up: float

    def cells(self) -> list[str]:
        counts = [metric("count", count) for count in (self.rows, self.rounds, self.steps, self.tokens)]
        weight = "–" if self.weight is None else f"{100 * self.weight:.1f}%"
        return [
            *counts,
            weight,
            "–" if self.loss is None else metric("loss", self.loss),
            size(self.down),
            size(self.up),
        ]


def done(story: Story, member: Member) -> Done:
    def total(key: str) -> float:
        return sum(value for _, value in story.curve("clients", member.id, key))

    weights = [value for _, value in story.curve("weights", member.id)]
    losses = story.curve("clients", member.id, "train_loss")
    took = sum(member.id in mapping(rnd.get("clients")) for rnd in story.rounds)
    return Done(
        member.id, member.rows, took, total("steps"), total("tokens"),
        fmean(weights) if weights else None, losses[-1][1] if losses else None, total("bytes_down"), total("bytes_up"),
    )  # fmt: skip


def together(group: Sequence[Done]) -> Done:
    weights = [d.weight for d in group if d.weight is not None]
    losses = [d.loss for d in group if d.loss is not None]
    return Done(
        "", sum(d.rows for d in group), sum(d.rounds for d in group), sum(d.steps for d in group),
        sum(d.tokens for d in group), fmean(weights) if weights else None, fmean(losses) if losses else None,
        sum(d.down for d in group), sum(d.up for d in group),
    )  # fmt: skip


def own_table(story: Story) -> str:
    """Mean, least and most of the clients' own models' scores, of all and of each rank or level."""
    keys, kinds = own_keys(story), story.by_kind()
    scored = {key: client_scores(story, "own", key) for key in keys}
    lines = []
    for name, group in {"all": story.members, **(kinds if len(kinds) > 1 else {})}.items():
        cells = [spread(key, [scored[key][member] for member in group if member in scored[key]]) for key in keys]
        lines.append([f"{len(group)} of {safe(name)}" if name in kinds else f"all {len(group)}", *cells])
    return table(["mean (least to most)", *map(said, keys)], lines) if keys else ""


def spread(key: str, values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{metric(key, fmean(values))} ({metric(key, min(values))} to {metric(key, max(values))})"


def mix(member: Member) -> str:
    """The most frequent labels of a client."""
    ordered = sorted(member.labels.items(), key=lambda pair: -pair[1])
    told = [f"{safe(label)} {metric('count', count)}" for label, count in ordered[:6]]
    return ", ".join(told) + (f", {len(ordered) - 6} more" if len(ordered) > 6 else "")


def rounds_table(story: Story) -> str:
    """Every round of a short run; of a long one about a dozen, of those evaluated, with the first and the last."""
    keys = story.keys("eval")
    head = ["round", "train loss", *(f"held-out {said(key)}" for key in keys), "clients", "down", "up", "time"]
    lines = []
    for rnd in condensed(story.rounds):
        values = [("loss", number(rnd.get("train_loss"))), *((key, number(at(rnd, "eval", key))) for key in keys)]
        moved = [number(rnd.get(key)) for key in ("bytes_down", "bytes_up")]
        seconds = number(rnd.get("seconds"))
        lines.append([
            str(rnd["round"]), *("–" if value is None else metric(key, value) for key, value in values),
            str(len(mapping(rnd.get("clients")) or mapping(rnd.get("weights")))),
            *("–" if value is None else size(value) for value in moved), "–" if seconds is None else span(seconds),
        ])  # fmt: skip
    return table(head, lines)


def condensed(rounds: Sequence[Mapping[str, Any]], most: int = 12) -> list[Mapping[str, Any]]:
    if len(rounds) <= most:
        return list(rounds)
    evaluated = [rnd for rnd in rounds if mapping(rnd.get("eval"))]
    pool = evaluated if len(evaluated) >= most // 2 else list(rounds)
    step = (len(pool) - 1) / (min(most, len(pool)) - 1)
    chosen = [pool[round(place * step)] for place in range(min(most, len(pool)))]
    chosen = [rounds[0]] * (chosen[0] is not rounds[0]) + chosen + [rounds[-1]] * (chosen[-1] is not rounds[-1])
    return chosen


def skipped(story: Story) -> str:
    """What the table leaves out, and where all of it is."""
    hidden = len(story.rounds) - len(condensed(story.rounds))
    parts = [f"{hidden} more rounds are in [rounds.jsonl](rounds.jsonl)."] if hidden else []
    if story.unreadable:
        parts.append(f"{story.unreadable} line{'s' * (story.unreadable != 1)} of rounds.jsonl could not be read.")
    return " ".join(parts)


def remarks(story: Story, key: str, most: int = 50) -> str:
    """What rounds said of single clients under ``key``, a sentence each."""
    found = [
        [str(rnd["round"]), safe(id), safe(str(reason))]
        for rnd in story.rounds
        for id, reason in mapping(rnd.get(key)).items()
    ]
    more = f"\n\n{len(found) - most} more are in [rounds.jsonl](rounds.jsonl)." if len(found) > most else ""
    return table(["round", "client", "reason"], found[:most]) + more if found else ""


def settings(recipe: Mapping[str, Any]) -> str:
    """One line a part of the recipe; what is null or a folder is in recipe.yaml only."""
    lines = []
    for part, inside in recipe.items():
        known = flat_settings(inside)
        told = [
            f"{safe(key)} `{code(clipped(value, 60))}`" if key else f"`{code(clipped(value, 60))}`"
            for key, value in known
            if (part, key) not in {("run", "command"), ("run", "output")}
        ]
        lines += [[safe(part), " · ".join(told)]] if told else []
    return table(["", "all of it is in [recipe.yaml](recipe.yaml)"], lines) if lines else ""


def flat_settings(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        parts = (flat_settings(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items())
        return [pair for part in parts for pair in part]
    if value is None or value == "":
        return []
    return [(path, json.dumps(value, default=str) if isinstance(value, list | bool) else str(value))]


def command(recipe: Mapping[str, Any]) -> str:
    """The exact command, in a fence that nothing inside can close."""
    told = at(recipe, "run", "command")
    words = " ".join(map(str, told)) if isinstance(told, list) else str(told or "")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", words)), default=0))
    return f"{fence}sh\n{words}\n{fence}" if words else ""


def picture(name: str, drawn: Sequence[str]) -> str:
    return f"![{ALT[name]}](plots/{name}.png)" if name in drawn else ""


ASKED = ("tsne",)
"""Plots that another command makes, which needs more than the folder's records."""

TIMES = (
    "Training is the mean over a round's steps, before the average; held out is measured after it, and may look better."
)
IDEAL = (
    "The error of what is served is its distance from the ideal: the mean of the clients' steps (of adapters: as "
    "products), upon what was served before. FedIT's cross terms, zero-padding's dilution and what FlexLoRA cuts off "
    "and no client returns are such errors, and add up over the rounds; FedHL and FLoRA have none but rounding."
)
"""What a picture cannot say of itself."""

ALT = {
    "learning": "Loss and score by round, against the base model",
    "clients": "Train loss of each client by round, coloured by rank or level",
    "own": "Scores of the clients' own models, a box for all and for each rank or level",
    "tsne": "What the clients' networks make of their test examples, in two dimensions (t-SNE)",
    "data": "Rows of each client, by label where they have labels",
    "ranks": "Weights by rank or level and client, and truncation error",
    "traffic": "Bytes down and up, by round and by rank or level",
    "telemetry": "Why a rule loses: error of what is served, truncation, ranks, drift of the clients, by round",
    "conditioning": "Smallest singular value of each layer by round",
}
