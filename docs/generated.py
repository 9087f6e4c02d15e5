"""The pages of the site that are read from the code: every key of a recipe, every rule, and the kept results.

MkDocs calls ``on_files`` while it builds. Keys and rules come from the text of their dataclasses, as ``fedllm keys``
and ``fedllm ls`` read them, so no page can say what the code does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from fedllm.commands.keys import cls, every_section, names
from fedllm.commands.listing import described, rule_line
from fedllm.config import plain_yaml, source
from fedllm.config.pages import pages
from fedllm.config.source import Class, Key

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages, and the pictures of ``results/``."""
    made = {"recipes.md": recipe_reference(), "methods.md": methods(), "results/index.md": results()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for picture in sorted((ROOT / "results").glob("*/*.png")):
        files.append(File.generated(config, str(picture.relative_to(ROOT)), abs_src_path=str(picture)))
    return files


def recipe_reference() -> str:
    parts = [REFERENCE]
    chapter = ""
    for title, section, summary, keys in every_section():
        if section.partition(".")[0] != chapter:
            chapter = section.partition(".")[0]
            parts.append(f"## {chapter}")
        heading = f"### `{title}`" if title != section else ""
        parts += [heading, f"{code(summary)}." if summary else "", key_table(section, keys)]
    parts += ["## Pages that come with fedllm", "`fedllm cp NAME my.yaml` copies one to edit."]
    parts.append(two_columns(described("recipes"), "recipe"))
    parts += ["`fedllm sweep NAME` runs one of these.", two_columns(described("sweeps"), "sweep")]
    settings = cls("fedllm.evaluation.settings", "Settings")
    parts += ["## Keys of `fedllm evaluate`", f"{code(settings.summary)}.", key_table("", source.keys(settings))]
    return "\n\n".join(part for part in parts if part) + "\n"


REFERENCE = """# Recipe reference

A recipe is a page of YAML. Its sections are the headings below; `section.key=value` after a command overrides one key,
and `--section.key value` is the same. `fedllm keys WORD` prints these tables in a terminal. A key that is not here is
refused with the nearest one that is, before anything is loaded.
"""


def key_table(section: str, keys: Mapping[str, Key]) -> str:
    """A row for every key; empty where there is none."""
    if not keys:
        return ""
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    for key in keys.values():
        name = f"{section}.{key.name}" if section else key.name
        default = "must be given" if key.default is None else f"`{cell(key.default)}`" if key.default else "`''`"
        rows.append(f"| `{name}` | {cell(key.type)} | {default} | {cell(code(key.line))} |")
    return "\n".join(rows)


def two_columns(told: Mapping[str, str], what: str) -> str:
    rows = [f"| {what} | |", "|---|---|", *(f"| `{name}` | {cell(code(line))} |" for name, line in told.items())]
    return "\n".join(rows)


def methods() -> str:
    """Every rule with its paper, its constants, its recipes and its code."""
    table = names("algorithm")
    shared = [kind.module for kind in table.values()]
    uses: dict[str, list[str]] = {}
    for name, path in pages().items():
        rule = (plain_yaml.read(path).get("algorithm") or {}).get("name", "")
        uses.setdefault(rule, []).append(f"`{name}`")
    rows, parts = ["| `algorithm.name` | | recipes |", "|---|---|---|"], []
    for name, kind in table.items():
        line = code(rule_line(kind, shared.count(kind.module) > 1))
        rows.append(f"| [`{name}`](#{name}) | {cell(line)} | {', '.join(uses.get(name, [])) or 'by override'} |")
        parts.append(method(name, line, kind))
    return "\n\n".join([METHODS, "\n".join(rows), *parts]) + "\n"


METHODS = """# Methods

Every rule is one file: a frozen dataclass whose fields are the paper's constants and whose hooks are its equations.
`fedllm methods` prints the table; `algorithm.name=NAME` takes a rule, `algorithm.KEY=VALUE` one of its constants.
"""


def method(name: str, line: str, kind: Class) -> str:
    own = f"File: `{kind.module.replace('.', '/')}.py`"
    differs = code(kind.text("differs"))
    return "\n\n".join(
        part
        for part in (
            f"## `{name}` {{#{name}}}",
            f"{line}. {own}",
            f"Differs from the paper in: {differs}." if differs else "",
            key_table("algorithm", source.keys(kind)),
            f"::: {kind.module}.{kind.node.name}\n    options: {{heading_level: 3, show_bases: false, members: false}}",
        )
        if part
    )


def results() -> str:
    return (ROOT / "results" / "README.md").read_text(encoding="utf-8")


def code(text: str) -> str:
    """Literals of reStructuredText in Markdown's marks."""
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
