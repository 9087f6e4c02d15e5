"""What a recipe would do, before anything heavy is loaded."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from fedllm.progress import size
from fedllm.recipe import Recipe


def show(recipe: Recipe, plan: dict[str, Any], console: Console) -> None:
    """Clients, what they train and send, and what will be written where."""
    totals = plan["totals"]
    console.print(
        f"[bold]{recipe.name}[/bold]: {recipe.algorithm_name} on {recipe.model.name}, {totals['rounds']} rounds, "
        f"{totals['cohort']} of {totals['clients']} clients a round, data {recipe.data_name}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("client", "rank", "alpha", "scale", "rows", "steps", "tokens", "memory", "down", "up"):
        table.add_column(heading, justify="left" if heading == "client" else "right", no_wrap=True)
    for client in plan["clients"]:
        table.add_row(
            client["id"],
            str(client["rank"]),
            f"{client['alpha']:g}",
            f"{client['scale']:g}",
            f"{client['rows']:,}",
            f"{client['steps']:,}",
            f"{client['tokens']:,}",
            size(client["memory_bytes"]),
            size(client["bytes_down"]),
            size(client["bytes_up"]),
        )
    console.print(table)
    if plan.get("guessed"):
        console.print("The Hub cannot be reached: rows are the known number, tokens the most that max_length allows.")
    if totals["dropped_rows"]:
        console.print(
            f"{totals['dropped_rows']} rows lose their whole completion to worker.max_length and are left out."
        )
    console.print(
        f"steps, tokens and bytes are a round's (round 1; memory is estimated); "
        f"{size(totals['run_bytes'])} over the wire in the whole run, at that rate",
        soft_wrap=True,
    )
    console.print(
        f"writes {recipe.output}/: recipe.yaml rounds.jsonl checkpoint/ eval/ adapter/ report.md plots/", soft_wrap=True
    )
