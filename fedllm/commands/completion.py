"""Completion of commands, recipes, keys and their values in a shell, by click; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem, get_completion_class

from fedllm.commands import keys
from fedllm.config.pages import pages


def script(command: click.Command, shell: str) -> str:
    """The text that a shell evaluates."""
    kind = get_completion_class(shell)
    assert kind is not None, shell
    return kind(command, {}, "fedllm", "_FEDLLM_COMPLETE").source()


def complete_words(ctx: click.Context, option: click.Parameter, incomplete: str) -> Sequence[CompletionItem]:
    """What may stand here on a line of ``RECIPE a.b=c``.

    Bash breaks words at ``=``: ``a.b=c`` arrives as three of them.
    """
    given = list(ctx.params.get(option.name or "") or ())
    if incomplete == "=" and given:
        given, incomplete = [*given, "="], ""
    if len(given) >= 2 and given[-1] == "=":
        return [CompletionItem(value) for value in values(given[-2]) if value.startswith(incomplete)]
    key, equals, begun = incomplete.partition("=")
    if equals:
        return [CompletionItem(f"{key}={value}") for value in values(key) if value.startswith(begun)]
    found = [CompletionItem(name) for name in pages() if not given and name.startswith(incomplete)]
    return [*found, *(CompletionItem(f"{name}=", help=line) for name, line in known(incomplete).items())]


def complete_options(incomplete: str) -> list[CompletionItem]:
    """The keys of a recipe as ``--a.b``."""
    if not incomplete.startswith("--"):
        return []
    return [CompletionItem(f"--{name}", help=line) for name, line in known(incomplete[2:]).items()]


def known(begun: str) -> dict[str, str]:
    """The keys that begin so, each with its line."""
    found = {f"{section}.name": "which one" for section in keys.NAMED}
    for name, key in keys.every_key():
        found.setdefault(name, key.line)
    return {name: line for name, line in found.items() if name.startswith(begun)}


def values(name: str) -> list[str]:
    """What a key takes, where that is a list."""
    if name == "recipe":
        return list(pages())
    section, _, last = name.removeprefix("--").rpartition(".")
    if last == "name" and section in keys.NAMED:
        return list(keys.names(section))
    found = [key.choices for full, key in keys.every_key() if full == name.removeprefix("--")]
    return list(dict.fromkeys(choice for choices in found for choice in choices))
