"""What there is to choose from, and a copy of a page to edit."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedllm.commands.keys import names
from fedllm.config import source
from fedllm.config.pages import find, pages
from fedllm.config.source import Class
from fedllm.config.suggest import nearest
from fedllm.errors import FedError


def listing(what: Sequence[str]) -> str:
    """A heading and a line for each thing of the kinds asked for; all of them without a word.

    Raises:
        FedError: there is no such kind.
    """
    for kind in what:
        if kind not in KINDS:
            raise FedError(f"ls {kind}: {nearest(kind, KINDS, 'list')}")
    parts = []
    for kind in what or KINDS:
        found = KINDS[kind]()
        width = max(map(len, found))
        parts.append("\n".join([f"{kind}:", *(f"  {name:{width}}  {line}".rstrip() for name, line in found.items())]))
    return "\n\n".join(parts)


def described(kind: str) -> dict[str, str]:
    """Each page with the first sentence of its opening comment."""
    return {name: opening(path) for name, path in pages(kind).items()}


def opening(page: Path) -> str:
    """The first sentence of the comment at the top of a page, its command line apart."""
    lines = []
    for line in page.read_text(encoding="utf-8").splitlines()[1:]:
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    return re.split(r"(?<=[a-z)\]0-9][.]) ", text)[0].rstrip(".:")


def methods() -> dict[str, str]:
    """Each rule with its paper: the first line of its module, and of its class where rules share a module."""
    table = names("algorithm")
    shared = [kind.module for kind in table.values()]
    return {name: rule_line(kind, shared.count(kind.module) > 1) for name, kind in table.items()}


def rule_line(kind: Class, shared: bool) -> str:
    first = source.plain((ast.get_docstring(source.text_of(kind.module)) or "").partition("\n")[0])
    paper, _, idea = first.partition(": ")
    return f"{paper}: {kind.summary if shared else idea}".rstrip(".")


def summaries(section: str) -> dict[str, str]:
    return {name: kind.summary for name, kind in names(section).items()}


KINDS: Mapping[str, Callable[[], dict[str, str]]] = {
    "recipes": lambda: described("recipes"),
    "sweeps": lambda: described("sweeps"),
    "methods": methods,
    "tasks": lambda: summaries("data"),
    "partitions": lambda: summaries("data.partition"),
    "guards": lambda: summaries("robust"),
}


def copy_page(name: str, target: Path, kind: str, force: bool) -> str:
    """Copies a page of the package; says how to run the copy.

    Raises:
        FedError: no such page, a target that is there already or has another ending.
    """
    page = find(name, kind, f"cp {name}: " if kind == "sweeps" else "cp ")
    if target.is_dir():
        target = target / page.name
    writable(target, force)
    target.write_bytes(page.read_bytes())
    verb = "sweep" if kind == "sweeps" else "train"
    return f"{target}: edit it, then `fedllm {verb} {target}`"


def writable(target: Path, force: bool) -> None:
    """Refuses a page that would not be found again, or would replace another one."""
    if target.suffix not in {".yaml", ".yml"}:
        raise FedError(f"{target}: a page of your own ends in .yaml, so that it is found by its path.")
    if target.exists() and not force:
        raise FedError(f"{target} is there already: give another name, or --force to replace it.")
    if not target.resolve().parent.is_dir():
        raise FedError(f"{target}: there is no folder {target.parent}.")
