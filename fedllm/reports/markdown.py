"""Tables and escapes of Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedllm.reports.run_record import (
    clipped,
)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and numbers to the right."""
    right = [all(re.match(r"^[*–+\-\d]", row[place]) for row in lines) for place in range(len(head))]
    rule = ["---:" if aside and place else "---" for place, aside in enumerate(right)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *lines])


def said(key: str) -> str:
    """A key as words, safe in Markdown."""
    return safe(key.replace("_", " "))


def safe(words: str) -> str:
    """Text of unknown origin on one line, with nothing in it that Markdown or HTML would act on."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", clipped(" ".join(words.split()), 300))


def code(words: str) -> str:
    """Text of unknown origin between single backticks inside a table."""
    return " ".join(words.split()).replace("`", "'").replace("|", "\\|")
