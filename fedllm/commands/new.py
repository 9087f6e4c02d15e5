"""A recipe's page of one's own, from three answers."""

from __future__ import annotations

from pathlib import Path

import click
import yaml

from fedllm.commands.keys import names, refuse_typos
from fedllm.commands.listing import writable
from fedllm.config.suggest import nearest
from fedllm.errors import FedError

PAGE = """\
# fedllm train {target}
#
# {ranks} on {data}, by {rule}. `fedllm plan {target}` says who would train what; `fedllm keys` names every key.
run:
  rounds: 5
algorithm:
  name: {rule}             # others: fedllm ls methods
model:
  name: {model}
data:
{section}
  partition: {{name: iid}}   # others: fedllm ls partitions
clients:
  rank: [{rank}]            # one for each client
worker:
  name: sft
  alpha: 2r                # twice the client's rank
  epochs: 1                # a round; or steps: 50
  batch_size: 4
  learning_rate: 2.0e-4
eval:
  every: 1
"""


def write_page(
    target: Path | None, *, model: str | None, data: str | None, ranks: str | None, rule: str | None, force: bool
) -> int:
    """Asks for what was not given, and writes the page.

    Raises:
        FedError: an answer that no recipe takes, or a page that is there already.
    """
    target = target or Path(click.prompt("Page", default="mine.yaml"))
    writable(target, force)
    model = model or click.prompt("Model (a Hub id, a folder, a .gguf file, or pico, a random one)", default="pico")
    data = data or click.prompt("Data (a task of `fedllm ls tasks`, or a file or folder of yours)", default="alpaca")
    rank = checked_ranks(ranks or click.prompt("Ranks, one for each client", default="16,8,4"))
    rule = rule or click.prompt("Rule (`fedllm ls methods`)", default="fedhl")
    page = PAGE.format(
        target=target,
        ranks=f"{len(rank)} clients of ranks {', '.join(map(str, rank))}",
        data=data,
        rule=scalar(rule),
        model=scalar(model),
        section=data_section(data),
        rank=", ".join(map(str, rank)),
    )
    target.write_text(page, encoding="utf-8")
    try:
        refuse_typos([f"recipe={target}"])
    except FedError:
        target.unlink()
        raise
    click.echo(f"{target}: `fedllm plan {target}` shows who would train what, `fedllm train {target}` runs it.")
    return 0


def checked_ranks(text: str) -> list[int]:
    """The ranks of ``16,8,4``."""
    parts = [part for part in text.strip("[] ").replace(",", " ").split() if part]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise FedError(f"ranks {text!r}: give a whole number from 1 up for each client, such as 16,8,4.")
    return [int(part) for part in parts]


def data_section(data: str) -> str:
    """``name`` of a task, or ``own`` with the path of the user's rows."""
    tasks = names("data")
    if data in tasks:
        return f"  name: {data}"
    if "own" in tasks and (Path(data).exists() or "/" in data):
        key = "path" if Path(data).exists() else "hub"
        return f"  name: own\n  {key}: {scalar(data)}"
    raise FedError(f"data {data}: {nearest(data, tasks, 'task')}")


def scalar(text: str) -> str:
    """One YAML value on one line."""
    return yaml.safe_dump(text, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
