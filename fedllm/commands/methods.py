"""The table of methods: every rule with its paper, its file and its recipes, read from the code itself."""

from __future__ import annotations

import inspect
import re
import sys

from fedllm.algorithms import ALGORITHMS
from fedllm.config import plain_yaml
from fedllm.config.pages import pages as all_pages


def table() -> str:
    """Markdown, a row a rule, in the order of ``ALGORITHMS``. Paper and idea are the first line of the module."""
    recipes = _recipes()
    lines = [
        "| `algorithm.name` | paper | what it does | differs from the paper in | file | recipes |",
        "|---|---|---|---|---|---|",
    ]
    for name, rule in ALGORITHMS.items():
        module = sys.modules[rule.__module__]
        file = f"{module.__name__.replace('.', '/')}.py"
        paper, _, idea = inspect.cleandoc(module.__doc__ or "").partition("\n")[0].partition(": ")
        if sum(other.__module__ == rule.__module__ for other in ALGORITHMS.values()) > 1:  # a family shares the file
            idea = _first_sentence(rule)
        pages = ", ".join(f"`{page}`" for page in recipes.get(name, [])) or "by override"
        does = idea.rstrip(".").replace("``", "`")
        differs = rule.differs.replace("|", "\\|")
        lines.append(f"| `{name}` | {paper} | {does} | {differs} | [{file.split('/')[-1]}]({file}) | {pages} |")
    return "\n".join(lines)


def _first_sentence(rule: type) -> str:
    paragraph = inspect.cleandoc(rule.__doc__ or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`")
    return re.split(r"(?<=[.]) ", paragraph)[0].rstrip(".")


def _recipes() -> dict[str, list[str]]:
    """Pages by the rule they name."""
    pages: dict[str, list[str]] = {}
    for page in all_pages().values():
        rule = (plain_yaml.read(page).get("algorithm") or {}).get("name", "")
        pages.setdefault(rule, []).append(page.stem)
    return pages
