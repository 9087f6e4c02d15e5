"""What a recipe would do, before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from fedllm.recipe.sections import Recipe
from fedllm.reports.formatting import size


def _count(value: int) -> str:
    return f"{value:,}"


COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("client", "id", str),
    ("level", "level", str),
    ("rank", "rank", str),
    ("alpha", "alpha", "{:g}".format),
    ("scale", "scale", "{:g}".format),
    ("rows", "rows", _count),
    ("steps", "steps", _count),
    ("tokens", "tokens", _count),
    ("memory", "memory_bytes", size),
    ("down", "bytes_down", size),
    ("up", "bytes_up", size),
)
"""Heading, key of a planned client and how it is written; a plan has those that its worker knows."""


def show(recipe: Recipe, plan: dict[str, Any], console: Console) -> None:
    """Clients, what they train and send, and what will be written where."""
    totals = plan["totals"]
    console.print(
        f"[bold]{recipe.name}[/bold]: {recipe.rule} on {recipe.models}, {totals['rounds']} rounds, "
        f"{totals['cohort']} of {totals['clients']} clients a round, data {recipe.data_name}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = [column for column in COLUMNS if column[1] in plan["clients"][0]]
    for heading, _, _ in shown:
        table.add_column(heading, justify="left" if heading in {"client", "level"} else "right", no_wrap=True)
    for client in plan["clients"]:
        table.add_row(*(written(client[key]) for _, key, written in shown))
    console.print(table)
    if plan.get("levels"):
        levels = Table(box=None, pad_edge=False, header_style="bold")
        for key in plan["levels"][0]:
            levels.add_column(key.replace("_", " "), justify="left" if key == "name" else "right", no_wrap=True)
        for level in plan["levels"]:
            levels.add_row(*(value if key == "name" else _count(value) for key, value in level.items()))
        console.print(levels)
        console.print(
            f"the run: {size(totals['comm_bytes'])} as 4 bytes a number both ways; in the papers' columns "
            f"{totals['comm_paper_gb']:,.2f} GB (a byte a parameter, one way), "
            f"{totals['flops_paper_1e12']:,.2f}e12 FLOPs",
            soft_wrap=True,
        )
    if plan.get("at_most"):
        console.print(f"down, up and bytes are the most that can travel: {plan['at_most']}.", soft_wrap=True)
    if plan.get("guessed"):
        console.print("The Hub cannot be reached: rows are the known number, tokens the most that max_length allows.")
    if totals["dropped_rows"]:
        console.print(
            f"{totals['dropped_rows']} rows lose their whole completion to worker.max_length and are left out."
        )
    if totals.get("cut_rows"):
        console.print(
            f"{totals['cut_rows']} of {totals['rows']} rows lose the end of their completion to worker.max_length: "
            "from them the model does not learn to stop.",
            soft_wrap=True,
        )
    if totals["undealt_rows"]:
        console.print(f"{totals['undealt_rows']} rows are dealt to nobody by the partition.")
    console.print(
        f"steps, tokens and bytes are a round's (round 1; memory is estimated); "
        f"{size(totals['run_bytes'])} over the wire in the whole run, at that rate",
        soft_wrap=True,
    )
    for line in plan.get("privacy", ()):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(
        f"writes {recipe.output}/: recipe.yaml rounds.jsonl checkpoint/ eval/ {recipe.worker.exported}/ "
        "report.md plots/",
        soft_wrap=True,
    )
