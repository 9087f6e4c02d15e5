"""What somebody may have meant by a name that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of ``names``, None where none is; letters that only changed places come first."""
    near = difflib.get_close_matches(name, list(names), n=5, cutoff=0.5)
    return max(near, key=lambda other: sorted(other) == sorted(name), default=None)


def nearest(name: str, names: Iterable[str], what: str) -> str:
    """ "There is no such thing", the nearest name there is, and all of them."""
    names = sorted(names)
    near = closest(name, names)
    hint = f" Did you mean {near}?" if near else ""
    return f"there is no {what} of that name.{hint} Valid: {', '.join(names)}."
