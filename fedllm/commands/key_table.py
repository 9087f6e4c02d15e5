"""The keys of a recipe and of an evaluation as text: for ``--help`` and ``fedllm keys``."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence

from fedllm.commands.keys import cls, every_section, sections
from fedllm.config import source
from fedllm.config.source import Key
from fedllm.config.suggest import nearest
from fedllm.errors import FedError

LONGEST = 40
"""Characters of a default that are shown; a prompt is longer."""


def help_text(asked: Sequence[str] = ()) -> str:
    """Every section with its keys; ``asked`` keeps those whose section, name or key has one of the words in it.

    Raises:
        FedError: no key has one of the words.
    """
    parts = []
    for title, section, summary, keys in every_section():
        chosen = {
            name: key
            for name, key in keys.items()
            if not asked or any(word in f"{title}.{name}" or word in f"{section}.{name}" for word in asked)
        }
        alone = not keys and (not asked or any(word in title for word in asked))
        if chosen or alone:
            parts.append(block(title, summary, section, chosen))
    if not parts:
        raise FedError(f"keys {' '.join(asked)}: {nearest(asked[0], sections(), 'section')}")
    return "\n".join(parts)


def evaluation_help() -> str:
    """The keys that ``fedllm evaluate`` takes."""
    settings = cls("fedllm.evaluation.settings", "Settings")
    return block("Keys", settings.summary, "", source.keys(settings))


def block(title: str, summary: str, section: str, keys: Mapping[str, Key]) -> str:
    """A section: its title, and a paragraph for each key."""
    width = min(110, shutil.get_terminal_size().columns)
    wide = textwrap.TextWrapper(width, initial_indent="      ", subsequent_indent="      ")
    lines = [textwrap.shorten(f"{title}: {summary}.", width, placeholder=" ...")]
    for key in keys.values():
        full = f"{section}.{key.name}" if section else key.name
        lines.append(f"  {full}  [{key.type}]  {told_default(key)}")
        if key.line:
            lines += wide.wrap(key.line)
    return "\n".join(lines) + "\n"


def told_default(key: Key) -> str:
    if key.default is None:
        return "must be given"
    return f"default: {textwrap.shorten(key.default, LONGEST, placeholder=' ...') or repr(key.default)}"
