"""Strict, typed sections: a mapping becomes a frozen dataclass, or one sentence says why it cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from fedllm.config.suggest import closest, nearest
from fedllm.errors import FedError


def as_section(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FedError(f"{where}={value!r}: this is a section of keys, such as {where}.name=..., not one value.")
    return dict(value)


def parse_named(
    table: Mapping[str, type], value: Any, where: str, default: str | None, also: Iterable[str] = ()
) -> tuple[str, Any]:
    section = as_section(value, where)
    name = section.pop("name", default)
    if name is None:
        raise FedError(f"{where}.name is missing. One of: {', '.join(sorted(table))}.")
    if not isinstance(name, str):
        raise FedError(f"{where}.name={name!r}: give one name, of: {', '.join(sorted(table))}.")
    if name not in table:
        raise FedError(f"{where}.name={name}: {nearest(str(name), table, where.rpartition('.')[2])}")
    return name, parse_section(table[name], section, where, also={"name", *also})


def parse_section(kind: type, value: Any, where: str, also: Iterable[str] = ()) -> Any:
    """The frozen dataclass ``kind`` with a section's values. Raises FedError for an unknown key or a wrong type."""
    section = as_section(value, where)
    refuse_unknown_keys(section, [*(f.name for f in dataclasses.fields(kind)), *also], where)
    try:
        return TypeAdapter(_strict(kind)).validate_python(section)
    except ValidationError as error:
        first = error.errors()[0]
        key, given = [where] if where else [], section
        for part in first["loc"]:  # the branch of a union is a part too, and no key
            if isinstance(given, Mapping) and part in given:
                key, given = [*key, str(part)], given[part]
        null = any(first["loc"][:1] == (f.name,) and "None" in str(f.type) for f in dataclasses.fields(kind))
        needed = _needed(first, given) + (", or null" if null else "")
        raise FedError(f"{'.'.join(key)}={given!r}: give {needed}.") from error
    except FedError as error:
        raise FedError(str(error) if str(error).startswith(where) else f"{where}.{error}") from error


def _needed(fault: Mapping[str, Any], given: Any) -> str:
    """What a field takes instead, as it follows "give"."""
    match fault["type"]:
        case "missing":
            return f"{fault['loc'][-1]} too, it has no default"
        case "tuple_type":
            return f"a list, [{given}]" if isinstance(given, str | int | float) else "a list"
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "string_type" if isinstance(given, Mapping):  # {prompt} without quotes
            return "a string; one with braces in it goes into quotes, '\"...\"'"
        case "value_error":  # the words of `fedllm.config.types.needs`
            return fault["msg"].removeprefix("Value error, ")
    return fault["msg"].removeprefix("Input should be ").replace("a valid ", "a ")


def _strict(kind: type) -> type:
    with_config(ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False))(kind)
    return kind


def refuse_unknown_keys(section: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    valid = list(valid)
    for key in section:
        if key not in valid:
            full = f"{where}.{key}" if where else str(key)
            near = closest(str(key), valid)
            hint = (
                f"Did you mean {where + '.' if where else ''}{near}?" if near else f"Valid: {', '.join(sorted(valid))}."
            )
            raise FedError(f"{full} is not a key of a recipe. {hint}")
