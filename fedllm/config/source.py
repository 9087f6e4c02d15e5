"""Settings read from source text: the keys, types, defaults and docs of a dataclass, without importing its module.

Importing a rule or a worker loads torch, which takes seconds. A typo, a list of keys and a completed word are answered
from the text of the same classes instead, so that nothing is written twice.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]

PLAIN = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text", "Any": "a value"}
"""Annotations of Python's own, as a reader of a recipe says them."""


class Unreadable(Exception):
    """The text alone does not say it; an import would."""


@dataclass(frozen=True)
class Key:
    """One field of a settings class.

    Args:
        name: the key.
        type: what it takes, in words.
        default: as YAML writes it; None where it must be given.
        line: its documentation.
        choices: the values it takes, where these are few and fixed.
    """

    name: str
    type: str
    default: str | None
    line: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Class:
    """A class in the text of a module."""

    module: str
    node: ast.ClassDef

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        paragraph = (ast.get_docstring(self.node) or "").partition("\n\n")[0]
        return re.split(r"(?<=[.:])\s", plain(paragraph) + " ")[0].rstrip(".: ")

    def bases(self) -> Iterator[Class]:
        """Its bases of this package, the nearest first; then itself is looked up before them."""
        for base in self.node.bases:
            try:
                found = lookup(self.module, ast.unparse(base))
            except Unreadable:
                continue
            if isinstance(found, Class):
                yield found

    def text(self, name: str) -> str:
        """The text that its own body sets a class attribute to; empty without any."""
        for statement in self.node.body:
            if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == name and statement.value:
                return str(ast.literal_eval(statement.value))
        return ""

    def attribute(self, name: str) -> Class:
        """The class that a class attribute is set to, its own or inherited."""
        for statement in self.node.body:
            if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == name and statement.value:
                found = lookup(self.module, ast.unparse(statement.value))
                if isinstance(found, Class):
                    return found
        for base in self.bases():
            return base.attribute(name)
        raise Unreadable(name)


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("``", "`")).strip()


@cache
def text_of(module: str) -> ast.Module:
    """The parsed text of a module of this package."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not module.startswith("fedllm") or not file.is_file():
        raise Unreadable(module)
    return ast.parse(file.read_text(encoding="utf-8"))


def lookup(module: str, name: str) -> Class | tuple[str, ast.expr]:
    """What a name stands for in a module: a class, or the expression that it is set to and its module.

    Raises:
        Unreadable: it is nothing that this package's text defines.
    """
    first, _, rest = name.partition(".")
    for statement in text_of(module).body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return Class(module, statement)
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == name and statement.value:
            return module, statement.value
        if isinstance(statement, ast.Assign) and any(ast.unparse(target) == name for target in statement.targets):
            return module, statement.value
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for alias in statement.names:
                if (alias.asname or alias.name) == first:
                    where = f"{statement.module}.{alias.name}" if rest else statement.module
                    return lookup(where, rest or alias.name)
    raise Unreadable(f"{module}.{name}")


def table(module: str, name: str) -> dict[str, Class]:
    """A dictionary of names to classes, merged from others or written out."""
    found = lookup(module, name)
    if isinstance(found, Class):
        raise Unreadable(name)
    return entries(*found)


def entries(module: str, value: ast.expr) -> dict[str, Class]:
    match value:
        case ast.BinOp(left, ast.BitOr(), right):
            return entries(module, left) | entries(module, right)
        case ast.Name() | ast.Attribute():
            return table(module, ast.unparse(value))
        case ast.Dict(keys, values):
            made: dict[str, Class] = {}
            for key, held in zip(keys, values, strict=True):
                if key is None:
                    made |= entries(module, held)
                    continue
                kind = lookup(module, ast.unparse(held))
                if not isinstance(key, ast.Constant) or not isinstance(kind, Class):
                    raise Unreadable(ast.unparse(value))
                made[str(key.value)] = kind
            return made
    raise Unreadable(ast.unparse(value))


def keys(kind: Class) -> dict[str, Key]:
    """The fields of a dataclass by name, inherited ones first."""
    found: dict[str, Key] = {}
    for base in reversed(list(kind.bases())):
        found |= keys(base)
    lines = documented(kind)
    for statement in kind.node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        hint, name = ast.unparse(statement.annotation), statement.target.id
        if hint.startswith("ClassVar") or "init=False" in (ast.unparse(statement.value) if statement.value else ""):
            continue
        line = lines.get(name) or (found[name].line if name in found else "")
        found[name] = Key(
            name,
            spoken(kind.module, statement.annotation),
            default_of(kind.module, statement.value),
            line,
            tuple(choices_of(kind.module, statement.annotation)),
        )
    return {name: Key(**{**vars(key), "line": lines.get(name) or key.line}) for name, key in found.items()}


def documented(kind: Class) -> dict[str, str]:
    """The lines under ``Args:`` by field; several fields may share one."""
    text = ast.get_docstring(kind.node) or ""
    block = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(block[1]) if block else ""):
        names, colon, line = entry.partition(":")
        if colon:
            found |= {name.strip(): plain(line) for name in names.split(",")}
    return found


def literal(module: str, node: ast.expr | None) -> Any:
    """The value of an expression of constants."""
    match node:
        case ast.Name() | ast.Attribute():
            found = lookup(module, ast.unparse(node))
            if isinstance(found, Class):
                raise Unreadable(ast.unparse(node))
            return literal(*found)
        case ast.Call(ast.Name("field"), _, [ast.keyword("default_factory", ast.Name("dict" | "list" as made))]):
            return {} if made == "dict" else []
        case ast.Call(ast.Name("field"), _, [ast.keyword("default_factory", ast.Lambda(_, ast.Call(_, [of])))]):
            return literal(module, of)
        case ast.BinOp(left, ast.Mod(), right):
            return literal(module, left) % literal(module, right)
        case None:
            raise Unreadable("nothing")
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise Unreadable(ast.unparse(node)) from error


def default_of(module: str, node: ast.expr | None) -> str | None:
    """A default as YAML writes it; a call of a settings class is its name."""
    if node is None:
        return None
    try:
        value = literal(module, node)
    except Unreadable:
        return ast.unparse(node)
    return value if isinstance(value, str) and value and "\n" not in value else json.dumps(value, ensure_ascii=False)


def choices_of(module: str, node: ast.expr) -> list[str]:
    """The fixed values that an annotation names."""
    match node:
        case ast.Subscript(ast.Name("Literal"), values):
            parts = values.elts if isinstance(values, ast.Tuple) else [values]
            return [str(literal(module, part)) for part in parts]
        case ast.BinOp(left, ast.BitOr(), right):
            return choices_of(module, left) + choices_of(module, right)
        case ast.Subscript(ast.Name("Annotated"), ast.Tuple([first, *_])):
            return choices_of(module, first)
        case ast.Name("bool"):
            return ["true", "false"]
        case ast.Name(id) if id not in PLAIN:
            try:
                found = lookup(module, id)
            except Unreadable:
                return []
            return [] if isinstance(found, Class) else choices_of(*found)
    return []


def spoken(module: str, node: ast.expr) -> str:
    """What an annotation takes, in words: those of ``needs`` where a type has them."""
    match node:
        case ast.Constant(None):
            return "null"
        case ast.Name(id) if id in PLAIN:
            return PLAIN[id]
        case ast.BinOp(left, ast.BitOr(), right):
            return f"{spoken(module, left)}, or {spoken(module, right)}"
        case ast.Subscript(ast.Name("Literal"), _):
            return ", ".join(choices_of(module, node))
        case ast.Subscript(ast.Name("Annotated"), ast.Tuple([first, *notes])):
            for note in notes:
                if isinstance(note, ast.Call) and ast.unparse(note.func) == "needs":
                    return str(literal(module, note.args[0]))
            return spoken(module, first)
        case ast.Subscript(ast.Name("tuple" | "list" | "Sequence"), inner):
            first = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
            return f"a list, each {spoken(module, first)}"
        case ast.Subscript(ast.Name("dict" | "Mapping"), _):
            return "a mapping"
        case ast.Name(id):
            try:
                found = lookup(module, id)
            except Unreadable:
                return id
            return id if isinstance(found, Class) else spoken(*found)
    return ast.unparse(node)
