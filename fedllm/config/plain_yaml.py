"""Plain YAML for pages that may come from anybody: values only, of bounded size, and every fault is one sentence.

``${...}`` is text and nothing is read from the environment. Aliases are refused, so that no page means more than it
says; so are tags, other than those of plain values.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedllm.errors import FedError

LONGEST = 500_000
"""Characters of a page."""

NODES = 50_000
"""Values of a page, those inside others included."""

DEEPEST = 32
"""Lists and mappings inside each other."""

DIGITS = 40
"""Of a number."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, without aliases, dates and binary values, and with limits."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name) is not taken: write the value out", mark)
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if self._nodes > NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {NODES} values", mark)
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"more than {DEEPEST} levels inside each other", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{str(node.value)[:40]!r} cannot be read as {kind}", node.start_mark
            ) from error

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            wrong = "a text with a NUL or half of a surrogate pair in it"
            raise yaml.constructor.ConstructorError(None, None, wrong, node.start_mark)
        if node.tag in NUMBERS and len(value) > DIGITS:
            wrong = f"a number of {len(value)} digits, and {DIGITS} are the most"
            raise yaml.constructor.ConstructorError(None, None, wrong, node.start_mark)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                wrong = "the key << is not taken: write the values out"
                raise yaml.constructor.ConstructorError(None, None, wrong, key.start_mark)
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable) and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands twice", key.start_mark)
            seen |= {name} if isinstance(name, Hashable) else set()
        return super().construct_mapping(node, deep=deep)


NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")

_Loader.yaml_constructors = {
    tag: made
    for tag, made in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in PLAIN
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in found if tag not in {NUMBERS[1], "tag:yaml.org,2002:timestamp"}]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.2's numbers: 1e-4 is one, which 1.1 takes for a text
_Loader.add_implicit_resolver(
    NUMBERS[1],
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
               r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)  # fmt: skip


def parse(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        FedError: it is none, or beyond the limits. The sentence names the line.
    """
    if len(text) > LONGEST:
        raise FedError(f"more than {LONGEST} characters, which no page of settings has.")
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise FedError(_fault(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def _fault(error: Exception) -> str:
    """A parser's message in one line, with the line of the page that it is about."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        problem = f"{error.context} {error.problem}" if error.problem.startswith("but ") else error.problem
        return f"{problem}{f' (line {mark.line + 1})' if mark else ''}."
    return str(error).splitlines()[0]


def read(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        FedError: no plain file, not UTF-8, no YAML, or beyond the limits.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FedError("it is no file.")
        with path.open(encoding="utf-8-sig") as stream:
            return parse(stream.read(LONGEST + 1))
    except UnicodeDecodeError as error:
        raise FedError(f"it is not UTF-8 (byte {error.start}).") from error
    except (OSError, ValueError) as error:
        raise FedError(f"it cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def assignment(argument: str) -> dict[str, Any]:
    """``a.b=c`` as ``{"a": {"b": c}}``; an empty value is an empty text.

    Raises:
        FedError: the value is no YAML.
    """
    key, _, text = argument.partition("=")
    value = parse(text) if text.strip() else ""
    *outer, last = key.split(".")
    page: dict[str, Any] = {last: value}
    for part in reversed(outer):
        page = {part: page}
    return page


def merged(page: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """``page`` with the values of ``part`` in their places; mappings are merged, all else is replaced.

    Raises:
        TypeError: a list where the page has a mapping, or the other way round.
    """
    result = dict(page)
    for key, value in part.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = merged(old, value)
        elif {isinstance(old, list), isinstance(value, list)} == {True, False} and (
            isinstance(old, Mapping) or isinstance(value, Mapping)
        ):
            raise TypeError(key)
        else:
            result[key] = value
    return result


def assignments(arguments: Sequence[str]) -> dict[str, Any]:
    """All ``a.b=c`` as one page; a later one wins.

    Raises:
        FedError: a value is no YAML, or two of them do not fit each other.
    """
    page: dict[str, Any] = {}
    for argument in arguments:
        try:
            page = merged(page, assignment(argument))
        except TypeError as error:
            raise FedError(f"{argument!r} does not fit what was given before.") from error
    return page
