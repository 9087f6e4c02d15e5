"""The ``fedllm`` command. Nothing heavy is imported before a command line is known to be sound."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

import fedllm
from fedllm.config.arguments import spelled
from fedllm.config.suggest import nearest
from fedllm.errors import FedError

WORDS = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
"""For commands that take a recipe's keys, in any spelling, beside their own options."""

FOLDER = click.Path(path_type=Path)


class Commands(click.Group):
    """Commands in the order of a run's life, and the nearest name for one that does not exist."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise FedError(f"{args[0]}: {nearest(args[0], self.commands, 'command')}")
        return super().resolve_command(ctx, args)


class RecipeCommand(click.Command):
    """A command that takes a recipe's keys: its help ends in all of them, and ``--a.b`` is completed."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from fedllm.commands.completion import complete_options

        return [*super().shell_complete(ctx, incomplete), *complete_options(incomplete)]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fedllm.commands.key_table import help_text

        super().format_epilog(ctx, formatter)
        formatter.write("\n" + help_text())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fedllm.__version__, prog_name="fedllm", message="%(prog)s %(version)s")
def command() -> None:
    """Federated fine-tuning of language models whose clients train LoRA adapters of different ranks.

    A recipe is a page of recipes/, or a path that ends in .yaml; `fedllm ls` names them. Its keys are overridden by
    a.b=c or --a.b c.
    """


def words(name: str, metavar: str, complete: bool = True) -> Callable[[Any], Any]:
    """An argument that takes whatever is left of the line."""
    from fedllm.commands.completion import complete_words

    return click.argument(
        name, nargs=-1, type=click.UNPROCESSED, metavar=metavar, shell_complete=complete_words if complete else None
    )


def quiet() -> None:
    from fedllm.models.libraries import quiet_libraries

    quiet_libraries()


@command.command(cls=RecipeCommand, context_settings=WORDS)
@words("arguments", "RECIPE [a.b=c ...]")
def train(arguments: Sequence[str]) -> int:
    """Runs a recipe: rounds, scores, report, adapter."""
    from fedllm.commands.keys import refuse_typos

    refuse_typos(arguments)
    from fedllm.train import main as run

    return run(spelled(arguments))


@command.command(cls=RecipeCommand, context_settings=WORDS)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@words("arguments", "RECIPE [a.b=c ...]")
def plan(arguments: Sequence[str], as_json: bool) -> int:
    """Shows who would train what, before anything heavy is loaded."""
    from fedllm.commands.keys import refuse_typos

    refuse_typos(arguments)
    from fedllm.commands.plan import show_plan

    show_plan(spelled(arguments), as_json)
    return 0


@command.command(context_settings=WORDS)
@words("arguments", "[PAGE] [a.b=c ...] [over.AXIS=[...] ...]")
@click.option("--out", type=FOLDER, help="The folder of the runs; runs/NAME by default.")
@click.option("--plan", "plan_only", is_flag=True, help="List the runs and where each stands, and stop.")
@click.option("--jobs", type=int, help="Runs at the same time; one a GPU by default, and one without any.")
@click.option("--launch", default="", metavar="COMMAND", help='Of each run, such as "accelerate launch -n 4".')
def sweep(arguments: Sequence[str], out: Path | None, plan_only: bool, jobs: int | None, launch: str) -> int:
    """Runs every combination of rules, seeds and other keys, resumably.

    PAGE is a name in sweeps/ or a path to a YAML page. Without one the line says it all:

    fedllm sweep recipe=smoke over.algorithm.name=[fedhl,flexlora] over.run.seed=[0,1,2]
    """
    from fedllm.commands.sweep import run

    quiet()
    return run(arguments, out=out, plan_only=plan_only, jobs=jobs, launch=launch)


@command.command()
@click.argument("runs", nargs=-1, required=True, type=FOLDER, metavar="RUN...")
@click.option("--out", type=FOLDER, help="Where the page, the tables and the plots go; compare/ by default.")
@click.option("--score", help="The score to put first; by default the first that is a share of the test rows.")
@click.option("--target", metavar="METRIC=VALUE", help="To reach; by default the loss that every rule reached.")
def compare(runs: Sequence[Path], out: Path | None, score: str | None, target: str | None) -> int:
    """Sets runs side by side: mean and spread over seeds, curves, the cost of a score."""
    from fedllm.commands.compare import default_folder, write

    print(write(runs, out or default_folder(runs), score, target))
    return 0


class EvaluationCommand(click.Command):
    """A command whose help ends in the keys of an evaluation."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fedllm.commands.key_table import evaluation_help

        formatter.write("\n" + evaluation_help())


@command.command(cls=EvaluationCommand, context_settings=WORDS)
@words("arguments", "RUN_OR_FOLDER_OR_ID [task=NAME] [a.b=c ...]", complete=False)
def evaluate(arguments: Sequence[str]) -> int:
    """Scores a run, an adapter or a model on a task's test rows, with receipts."""
    quiet()
    from fedllm.evaluation.run import evaluate as run
    from fedllm.evaluation.settings import target_arguments

    if not arguments:
        raise FedError("what is to be scored? Give a run's folder, a PEFT folder, a model's folder or a Hub id.")
    named = not arguments[0].startswith("-") and (not arguments[0].partition("=")[1] or Path(arguments[0]).exists())
    target = target_arguments(arguments[0], arguments[1:]) if named else []
    run(None, [*target, *spelled(["", *arguments[1:]])[1:]] if named else spelled(arguments))
    return 0


@command.command()
@click.argument("run", type=FOLDER)
def report(run: Path) -> int:
    """Writes report.md and the plots of a run's folder again."""
    from fedllm.reports.report import write

    print(write(run))
    return 0


@command.command()
@click.argument("run", type=FOLDER)
@click.option("--examples", type=int, help="At most, of all clients together.")
@click.option("--seed", type=int, default=0, help="Of the map: t-SNE has no one answer.")
def tsne(run: Path, examples: int | None, seed: int) -> int:
    """Draws what the clients' networks make of their test examples, as a map in the report."""
    from fedllm.commands.tsne import draw_map

    print(draw_map(run, examples, seed))
    return 0


@command.command()
@click.argument("run", type=FOLDER)
@click.argument("overrides", nargs=-1, metavar="[a.b=c ...]")
@click.option(
    "--samples", type=int, multiple=True, default=(50, 500), metavar="N ...", help="Examples of each Hessian."
)
@click.option("--probes", type=int, default=60, help="Random vectors for the Frobenius norm.")
def hessian(run: Path, overrides: Sequence[str], samples: Sequence[int], probes: int) -> int:
    """Measures the stable rank of the loss's Hessian where a network's run ended."""
    from fedllm.commands.hessian import write

    more = [word for word in overrides if word.isdecimal()]
    samples, overrides = (*samples, *map(int, more)), [word for word in overrides if word not in more]
    print(write(run, samples, probes, overrides).read_text())
    return 0


def _numbers(ctx: click.Context, option: click.Parameter, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"must be whole numbers with commas between them, got {text!r}") from None


@command.command()
@click.argument("rule", metavar="RULE", shell_complete=lambda ctx, option, text: _rules(text))
@click.argument("folders", nargs=-1, required=True, type=FOLDER, metavar="DIR...")
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="Where the aggregate goes; new or empty.")
@click.option("--samples", callback=_numbers, metavar="n1,n2,...", help="Rows of each client; equal by default.")
@click.option(
    "--global",
    "global_",
    type=FOLDER,
    metavar="DIR",
    help="The adapter of the round before: W_t for fedhl, the sum so far for flora.",
)
@click.option("--rank", type=int, metavar="R", help="Best approximation of this rank; all of the result by default.")
@click.option("--set", "constants", multiple=True, metavar="KEY=VALUE", help="A constant of the rule; may come again.")
@click.option(
    "--missing",
    type=click.Choice(["refuse", "zero", "skip"]),
    default="refuse",
    show_default=True,
    help="Modules that some adapters do not train: no update of theirs, or an average over the others.",
)
@click.option(
    "--extras",
    type=click.Choice(["refuse", "average", "drop"]),
    default="refuse",
    show_default=True,
    help="Biases and modules that were trained whole.",
)
@click.option("--epsilon", hidden=True)
@click.option("--temperature", hidden=True)
@click.option("--overwrite", is_flag=True, help="Replace the adapter that is in --out.")
def aggregate(rule: str, constants: Sequence[str], epsilon: str | None, temperature: str | None, **given: Any) -> int:
    """Aggregates PEFT adapter folders of any rank and alpha by a rule: the server, without a run."""
    from fedllm.commands.keys import refuse_rule

    older = [f"{key}={value}" for key, value in (("epsilon", epsilon), ("temperature", temperature)) if value]
    refuse_rule(rule)
    from fedllm.commands.aggregate import aggregate as run
    from fedllm.commands.aggregate import parse_constants, summary

    options = parse_constants(rule, [*older, *constants])
    print(summary(rule, given["out"], run(rule, options=options, **given)))
    return 0


def _rules(text: str) -> list[str]:
    from fedllm.commands.keys import rules_for_adapters

    return [name for name in rules_for_adapters() if name.startswith(text)]


@command.command()
@click.argument("run", type=FOLDER)
@click.option("--repo", metavar="OWNER/NAME")
@click.option("--dry-run", is_flag=True, help="List the files, upload nothing.")
@click.option("--public", is_flag=True, help="Anyone may read it; private by default.")
@click.option("--merged", is_flag=True, help="The merged model too, in the root; the adapter in adapter/.")
@click.option("--clients", is_flag=True, help="Each client's own adapter too, where the run kept them.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="Of the merged model.")
@click.option("--license", help="Of what is uploaded; the base model's where it is known.")
def push(run: Path, **given: Any) -> int:
    """Uploads a run's adapter and model card to the Hugging Face Hub, private by default."""
    quiet()
    from fedllm.export.hub import push_run

    push_run(run, **given)
    return 0


@command.command()
@click.argument("adapter", type=FOLDER)
@click.option("--base", metavar="ID", help="A Hub id or a folder; by default the model that the adapter names.")
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="Where the merged model goes; a new folder.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", help="Of it.")
def merge(adapter: Path, base: str | None, out: Path, dtype: str) -> int:
    """Adds an adapter into its base model's weights, and measures that it is the same model."""
    quiet()
    from fedllm.commands.merge import merge_adapter

    print(merge_adapter(adapter, base, out, dtype))
    return 0


@command.command("ls")
@click.argument("what", nargs=-1, metavar="[recipes|sweeps|methods|tasks|partitions|guards]")
def list_(what: Sequence[str]) -> int:
    """Lists recipes, sweeps, methods, tasks, partitions and guards, with a line each."""
    from fedllm.commands.listing import listing

    print(listing(what))
    return 0


@command.command("cp")
@click.argument("page", metavar="RECIPE", shell_complete=lambda ctx, option, text: _pages(text))
@click.argument("target", type=FOLDER, metavar="FILE.yaml")
@click.option("--sweep", "of_sweep", is_flag=True, help="Copy a page of sweeps/.")
@click.option("--force", is_flag=True, help="Replace the file.")
def copy(page: str, target: Path, of_sweep: bool, force: bool) -> int:
    """Copies a recipe's page, for you to edit."""
    from fedllm.commands.listing import copy_page

    print(copy_page(page, target, "sweeps" if of_sweep else "recipes", force))
    return 0


def _pages(text: str) -> list[str]:
    from fedllm.config.pages import pages

    return [name for name in pages() if name.startswith(text)]


@command.command()
@click.argument("asked", nargs=-1, metavar="[SECTION | WORD ...]")
def keys(asked: Sequence[str]) -> int:
    """Lists every key of a recipe: type, default, what it does. Words narrow it down."""
    from fedllm.commands.key_table import help_text

    print(help_text(asked))
    return 0


@command.command()
@click.argument("target", type=FOLDER, metavar="FILE.yaml", required=False)
@click.option("--model", help="A Hub id, a folder, a .gguf file, or pico.")
@click.option("--data", help="A task of `fedllm ls tasks`, or a file or folder of your own.")
@click.option("--ranks", help="One for each client, such as 32,16,8.")
@click.option("--rule", help="A method of `fedllm ls methods`.")
@click.option("--force", is_flag=True, help="Replace the file.")
def new(target: Path | None, **given: Any) -> int:
    """Asks for model, data and ranks, and writes a recipe's page of your own."""
    from fedllm.commands.new import write_page

    return write_page(target, **given)


class Subcommands(click.Group):
    """A group whose first word may also be a folder: ``fedllm serve init DEPLOY``, ``fedllm serve DEPLOY ...``."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        known = args and args[0] in self.commands
        return super().resolve_command(ctx, args if known else ["run", *args])


@command.group(cls=Subcommands, context_settings=WORDS)
def serve() -> None:
    """Runs a recipe with clients on other machines: fedllm serve DEPLOY RECIPE [a.b=c ...]."""
    from fedllm.fleets.flower import require_flower

    require_flower()


@serve.command("init")
@click.argument("folder", type=FOLDER, metavar="DEPLOY")
@click.option("--host", required=True, help="The name or address under which nodes reach this server.")
@click.option("--port", type=int, default=9443, show_default=True, help="The one that nodes reach.")
@click.option("--insecure", is_flag=True, help="Plain HTTP without keys, for nodes on this machine alone.")
def serve_init(folder: Path, host: str, port: int, insecure: bool) -> int:
    """Makes a server's folder: certificates, a secret, an empty list of clients."""
    from fedllm.commands.serve import init

    print(init(folder, host, port, insecure))
    return 0


@serve.command("allow")
@click.argument("folder", type=FOLDER, metavar="DEPLOY")
@click.argument("client", metavar="ID")
@click.argument("public", type=FOLDER, metavar="NODE.pub", required=False)
@click.option("--most-rows", type=int, help="It may claim; the claim weighs its updates.")
@click.option("--most-rank", type=int, help="It may claim.")
def serve_allow(folder: Path, client: str, public: Path | None, most_rows: int | None, most_rank: int | None) -> int:
    """Lets a client in, by its node's public key."""
    from fedllm.commands.serve import allow

    print(allow(folder, client, public, most_rows, most_rank))
    return 0


@serve.command("status")
@click.argument("folder", type=FOLDER, metavar="DEPLOY")
def serve_status(folder: Path) -> int:
    """Shows which clients are there, and who trains."""
    from fedllm.commands.serve import status

    print(status(folder))
    return 0


@serve.command("run", cls=RecipeCommand, context_settings=WORDS, hidden=True)
@click.argument("folder", type=FOLDER, metavar="DEPLOY")
@words("arguments", "RECIPE [a.b=c ...]")
@click.option("--rehearsal", is_flag=True, help="Nodes take the shares that the recipe's partition deals to them.")
@click.option("--least", type=int, help="Clients to begin with; by default all that are allowed.")
def serve_run(folder: Path, arguments: Sequence[str], rehearsal: bool, least: int | None) -> int:
    """Waits for its clients, runs the recipe with them, and writes the run's folder as `fedllm train` does."""
    from fedllm.commands.keys import refuse_typos

    refuse_typos(arguments)
    quiet()
    from fedllm.commands.serve import serve as run
    from fedllm.train import train as rounds

    return _until_stopped(lambda: run(folder, spelled(arguments), rounds, rehearsal=rehearsal, least=least))


@command.group(cls=Subcommands, context_settings=WORDS)
def join() -> None:
    """Takes part in a server's federations as one client: fedllm join SITE."""
    from fedllm.fleets.flower import require_flower

    require_flower()


@join.command("init")
@click.argument("folder", type=FOLDER, metavar="SITE")
@click.option("--client", required=True, metavar="ID", help="Under which the server knows it.")
@click.option("--server", default="127.0.0.1:9443", show_default=True, metavar="HOST:PORT")
@click.option("--insecure", is_flag=True, help="Plain HTTP, for a server on this machine alone.")
def join_init(folder: Path, client: str, server: str, insecure: bool) -> int:
    """Makes a node's folder: its keys, and a policy to edit."""
    from fedllm.commands.join import init

    print(init(folder, client, server, insecure))
    return 0


@join.command("approve")
@click.argument("folder", type=FOLDER, metavar="SITE")
@click.argument("digest", metavar="DIGEST")
def join_approve(folder: Path, digest: str) -> int:
    """Says yes to a recipe that waits for a person."""
    from fedllm.commands.join import say_yes

    print(say_yes(folder, digest))
    return 0


@join.command("run", context_settings=WORDS, hidden=True)
@click.argument("folder", type=FOLDER, metavar="SITE")
@click.option("--dry-run", is_flag=True, help="Say what this node would answer to a recipe, and send nothing.")
@words("arguments", "[RECIPE a.b=c ...]")
def join_run(folder: Path, dry_run: bool, arguments: Sequence[str]) -> int:
    """Takes part until it is stopped, within its policy."""
    quiet()
    from fedllm.commands.join import dry_run as answer
    from fedllm.commands.join import join as run

    if dry_run:
        print(answer(folder, spelled(arguments)))
        return 0
    if arguments:
        raise FedError(f"{' '.join(arguments)[:200]!r}: recipes come from the server; --dry-run looks at one.")
    return _until_stopped(lambda: run(folder))


def _until_stopped(run: Callable[[], int]) -> int:
    """Runs a program that ends by Ctrl-C or SIGTERM. 130: it was stopped."""
    from fedllm.fleets.flower.children import terminated_as_interrupt
    from fedllm.rounds import Interrupted

    terminated_as_interrupt()
    try:
        return run()
    except Interrupted as stopped:
        print(f"fedllm: {stopped}", file=sys.stderr)
        return 130


@command.command()
def methods() -> int:
    """Prints every rule with its paper, file and recipes, as Markdown."""
    from fedllm.commands.methods import table

    print(table())
    return 0


@command.command()
def env() -> int:
    """Prints the versions and devices that a bug report needs."""
    from fedllm.commands.environment import report as told

    print(told())
    return 0


@command.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Prints a shell's completion: eval "$(fedllm completion bash)" in its start-up file."""
    from fedllm.commands.completion import script

    print(script(command, shell))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. 2: something the user can mend, said in one sentence on stderr."""
    given = [str(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        code = command.main([*given] or ["--help"], prog_name="fedllm", standalone_mode=False)
        return (code or 0) if given else 2
    except FedError as error:
        print(f"fedllm: {error}", file=sys.stderr)
        return 2
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fedllm"
        print(f"{path}: {error.format_message()} See {path} --help.", file=sys.stderr)
        return 2
    except click.Abort:
        print("fedllm: stopped at once.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk that is full, a name that is too long, a folder that may not be read
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        print(f"fedllm: {where}{error.strerror or error}.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
