"""The ``fedllm`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedllm.errors import FedError


def train(arguments: list[str]) -> int:
    """fedllm train recipe=NAME [a.b=c ...]: run it"""
    from fedllm.train import main as run

    return run(arguments)


def plan(arguments: list[str]) -> int:
    """fedllm plan recipe=NAME [a.b=c ...] [--json]: who would train what, before anything heavy is loaded"""
    from rich.console import Console

    from fedllm.federation.build import build_federation
    from fedllm.federation.plan import show
    from fedllm.recipe import load
    from fedllm.train import hush

    hush()
    recipe = load([*(argument for argument in arguments if argument != "--json"), "run.plan=true"])
    planned = build_federation(recipe).plan()
    if "--json" in arguments:
        print(json.dumps(planned))
    else:
        show(recipe, planned, Console())
    return 0


def aggregate(arguments: list[str]) -> int:
    """fedllm aggregate RULE DIR... --out DIR: the server, without a run, on PEFT adapter folders"""
    from fedllm.commands.aggregate import main as run

    return run(arguments)


def evaluate(arguments: list[str]) -> int:
    """fedllm evaluate RUN_OR_FOLDER_OR_ID [task=NAME] [a.b=c ...]: score a run, an adapter or a model, with receipts"""
    from fedllm.train import hush

    hush()
    from fedllm.evaluation.run import evaluate as run
    from fedllm.evaluation.settings import target_arguments

    if arguments and arguments[0] in {"-h", "--help"}:
        print(evaluate.__doc__)
        return 0
    named = bool(arguments) and (not arguments[0].partition("=")[1] or Path(arguments[0]).exists())
    run(None, [*target_arguments(arguments[0]), *arguments[1:]] if named else arguments)
    return 0


def report(arguments: list[str]) -> int:
    """fedllm report RUN: write report.md and the plots of a run's folder again"""
    from fedllm.reports.report import write

    parser = argparse.ArgumentParser(prog="fedllm report", description=report.__doc__)
    parser.add_argument("run", type=Path)
    print(write(parser.parse_args(arguments).run))
    return 0


def tsne(arguments: list[str]) -> int:
    """fedllm tsne RUN [--examples N]: what the clients' networks make of their test examples, as a map in the report"""
    from fedllm.commands.tsne import main as run

    return run(arguments)


def sweep(arguments: list[str]) -> int:
    """fedllm sweep PAGE [a.b=c ...] [--out DIR] [--plan] [--jobs N]: rules x seeds x profiles, resumably"""
    from fedllm.train import hush

    hush()
    from fedllm.commands.sweep import main as run

    return run(arguments)


def compare(arguments: list[str]) -> int:
    """fedllm compare RUN... [--out DIR]: tables with mean ± std over seeds, curves, what a score costs"""
    from fedllm.commands.compare import main as run

    return run(arguments)


def hessian(arguments: list[str]) -> int:
    """fedllm hessian RUN [--samples N...] [--probes N]: stable rank of the loss's Hessian where a network ended"""
    from fedllm.commands.hessian import main as run

    return run(arguments)


def push(arguments: list[str]) -> int:
    """fedllm push RUN [--repo OWNER/NAME] [--dry-run] [--public] [--merged]: adapter and model card to the Hub"""
    from fedllm.train import hush

    hush()
    from fedllm.export.hub import main as run

    return run(arguments)


def methods(arguments: list[str]) -> int:
    """fedllm methods: every rule with its paper, file and recipes, as Markdown"""
    from fedllm.commands.methods import table

    print(table())
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "plan": plan,
    "aggregate": aggregate,
    "evaluate": evaluate,
    "report": report,
    "tsne": tsne,
    "sweep": sweep,
    "compare": compare,
    "hessian": hessian,
    "push": push,
    "methods": methods,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. 2: something the user can mend, said in one sentence on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in {"-h", "--help"}:
        print("\n".join(["The commands of fedllm:", "", *(f"  {command.__doc__}" for command in COMMANDS.values())]))
        return 0 if given else 2
    try:
        if given[0] in {"train", "plan"} and {"-h", "--help"} & set(given):
            print(f"{COMMANDS[given[0]].__doc__}\n\nA recipe is a page of recipes/, or a path that ends in .yaml.")
            return 0
        if given[0] not in COMMANDS:
            from fedllm.config.suggest import nearest

            raise FedError(f"fedllm {given[0]}: {nearest(given[0], COMMANDS, 'command')}")
        return COMMANDS[given[0]](given[1:])
    except FedError as error:
        print(f"fedllm: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
