"""The spellings of a command line: ``smoke``, ``--recipe smoke``, ``--a.b c`` and ``--a.b=c`` are ``a.b=c``."""

from __future__ import annotations

from collections.abc import Sequence

PAGE = {"-r", "--recipe", "--config"}
"""Other tools' options for the page."""


def spelled(words: Sequence[str]) -> list[str]:
    """The same command line as ``recipe=NAME`` and ``a.b=c``; what is neither is left for the reader to refuse."""
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word.startswith("-") and (name in PAGE or name.startswith("--")) and len(name.lstrip("-")) > 0:
            key = "recipe" if name in PAGE else name[2:]
            if not equals:  # a key alone at the end, or before another one, is a switch
                value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
            found.append(f"{key}={value}")
        elif not equals and not found and not word.startswith("-"):
            found.append(f"recipe={word}")
        else:
            found.append(word)
    return found
