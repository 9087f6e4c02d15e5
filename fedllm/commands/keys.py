"""Every key of a recipe, read from the settings classes' text: for ``fedllm keys``, for help, completion and typos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fedllm.config import plain_yaml, source
from fedllm.config.arguments import spelled
from fedllm.config.pages import find
from fedllm.config.source import Class, Key, Unreadable
from fedllm.config.suggest import closest, nearest
from fedllm.errors import FedError

PLAIN = {
    "run": ("fedllm.recipe.sections", "Run"),
    "clients": ("fedllm.recipe.sections", "Clients"),
    "eval": ("fedllm.recipe.sections", "Evaluation"),
    "hub": ("fedllm.recipe.sections", "Hub"),
    "admission": ("fedllm.recipe.sections", "Admission"),
    "faults": ("fedllm.fleets.faults", "Faults"),
    "wire": ("fedllm.wire.compression", "Wire"),
    "server": ("fedllm.algorithms.compositions.server_step", "Server"),
    "local": ("fedllm.algorithms.compositions.local_step", "LocalStep"),
    "privacy": ("fedllm.privacy.settings", "Privacy"),
}
"""Section -> the class whose fields are its keys."""

NAMED = {
    "algorithm": ("fedllm.algorithms", "ALGORITHMS", "fedhl"),
    "data": ("fedllm.tasks", "TASKS", ""),
    "data.partition": ("fedllm.data.partition", "PARTITIONS", "iid"),
    "worker": ("fedllm.workers", "WORKERS", "sft"),
    "robust": ("fedllm.server.robust", "ROBUST", "none"),
}
"""Section -> the table that its ``name`` is looked up in, and the name it has by default."""

PLUGINS = {"algorithm": "fedllm.algorithms", "data": "fedllm.tasks"}
"""Section -> the entry points by which installed packages add names."""


def names(section: str) -> dict[str, Class]:
    """The classes that a section's ``name`` stands for."""
    module, table, _ = NAMED[section]
    return source.table(module, table)


def data_keys() -> dict[str, Key]:
    """The keys of ``data`` that every task has."""
    found = source.keys(cls("fedllm.recipe.sections", "Data"))
    return {name: key for name, key in found.items() if name not in {"task", "partition"}}


def cls(module: str, name: str) -> Class:
    found = source.lookup(module, name)
    if not isinstance(found, Class):
        raise Unreadable(name)
    return found


def sections() -> tuple[str, ...]:
    found = source.lookup("fedllm.recipe.sections", "SECTIONS")
    if isinstance(found, Class):
        raise Unreadable("SECTIONS")
    return tuple(source.literal(*found))


def keys_of(section: str, name: str = "", worker: str = "sft") -> dict[str, Key]:
    """The keys of a section where its ``name`` is this one.

    Raises:
        Unreadable: the section or the name is not in the package's text, which a name from outside is not.
    """
    if section == "model":
        return source.keys(_entry("worker", worker).attribute("model_section"))
    if section in PLAIN:
        return source.keys(cls(*PLAIN[section]))
    own = source.keys(_entry(section, name))
    return own | data_keys() if section == "data" else own


def _entry(section: str, name: str) -> Class:
    table = names(section)
    if name not in table:
        raise Unreadable(name)
    return table[name]


def refuse_typos(arguments: Sequence[str]) -> None:
    """Checks the sections, keys and names of a command line and its page, before anything heavy is imported.

    A name that this package's text does not know, and that a package from outside may add, passes.

    Raises:
        FedError: with the nearest key or name that there is.
    """
    words = spelled(arguments)
    named = [word.partition("=")[2] for word in words if word.startswith("recipe=")]
    if len(named) != 1 or not named[0]:
        return  # the reader of recipes says what is wrong
    page = _page(find(named[0]))
    asked = _asked(words)
    for told, whence in ((page, page), (asked, page | asked)):
        _check(told, whence)


def _page(path: Path) -> dict[str, Any]:
    """The keys of a page with their values, flat."""
    try:
        told = plain_yaml.read(path)
    except FedError:
        return {}
    return dict(_flat(told)) if isinstance(told, Mapping) else {}


def _asked(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key == "recipe":
            continue
        try:
            value = plain_yaml.parse(text)
        except FedError:
            value = text
        found |= dict(_flat(value, key)) if isinstance(value, Mapping) and value else {key: value}
    return found


def _flat(told: Mapping[Any, Any], where: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """``(a.b, value)`` of a page, as deep as sections go; what lies deeper is a value."""
    for key, value in told.items():
        path = f"{where}.{key}" if where else str(key)
        inner = depth == 0 or path == "data.partition"
        if isinstance(value, Mapping) and value and inner and path.count(".") < 2:
            yield from _flat(value, path, depth + 1)
        else:
            yield path, value


def _check(told: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    chosen = {section: str(whole.get(f"{section}.name") or default) for section, (_, _, default) in NAMED.items()}
    for path in told:
        section, _, key = path.partition(".")
        if section not in sections():
            raise FedError(f"{path} is not a key of a recipe. {_hint(path, section)}")
        if section == "data" and key.startswith("partition."):
            section, key = "data.partition", key.partition(".")[2]
        if not key or (section == "data" and key == "partition"):
            continue
        if key == "name" and section in NAMED:
            _check_name(section, chosen[section])
            continue
        try:
            valid = keys_of(section, chosen.get(section, ""), chosen["worker"])
        except Unreadable:
            continue
        first = key.partition(".")[0]
        if first not in valid:
            raise FedError(f"{section}.{first} is not a key of a recipe. {_near(section, first, valid)}")


def _check_name(section: str, name: str) -> None:
    """A path or an entry point's name is another reader's to judge."""
    try:
        known = list(names(section))
    except Unreadable:
        return
    group = PLUGINS.get(section)
    if name in known or ":" in name or (group and name in metadata.entry_points(group=group).names):
        return
    same = {known_name.replace("_", ""): known_name for known_name in known}.get(name.lower().replace("_", ""))
    what = section.rpartition(".")[2] if section in {"algorithm", "data", "data.partition", "worker"} else "guard"
    told = f"there is no {what} of that name. Did you mean {same}?" if same else nearest(name, known, what)
    raise FedError(f"{section}.name={name}: {told}")


def rules_for_adapters() -> list[str]:
    """The rules that adapter folders may be aggregated by."""
    return list(source.table("fedllm.algorithms", "LOW_RANK"))


def refuse_rule(rule: str) -> None:
    """Checks the name of a rule on adapters, before the rules are imported."""
    known = rules_for_adapters()
    if rule not in known and ":" not in rule and rule not in metadata.entry_points(group=PLUGINS["algorithm"]).names:
        raise FedError(f"{rule}: {nearest(rule, known, 'rule')}")


def _near(section: str, key: str, valid: Mapping[str, Key]) -> str:
    if key in NO_KEY:
        return NO_KEY[key]
    if SHORT.get(key) in valid:
        return f"Did you mean {section}.{SHORT[key]}?"
    if near := closest(key, [*valid, "name"] if section in NAMED else valid):
        return f"Did you mean {section}.{near}?"
    elsewhere = _owners(key)
    if elsewhere:
        return f"Did you mean {elsewhere}?"
    return f"Valid: {', '.join(sorted(valid))}."


SHORT = {"lr": "learning_rate", "bs": "batch_size", "wd": "weight_decay"}
"""What other tools call a key."""

NO_KEY = {"device": "The device is chosen by accelerate; CUDA_VISIBLE_DEVICES= before the command means the CPU."}
"""What other tools have a key for, and a recipe has not."""


def _owners(key: str) -> str:
    """The key of this name, or of another tool's, in any section, as ``a.b`` or ``c.d``."""
    found = [full for full, _ in every_key() if full.rpartition(".")[2] == SHORT.get(key, key)]
    return " or ".join(dict.fromkeys(found))


def _hint(path: str, section: str) -> str:
    if path in NO_KEY:
        return NO_KEY[path]
    if "." not in path and (owners := _owners(path)):
        return f"Did you mean {owners}?"
    if near := closest(section, sections()):
        return f"Did you mean {near}{path[len(section) :]}?"
    return f"Valid: {', '.join(sorted(sections()))}."


def every_key() -> Iterator[tuple[str, Key]]:
    """``section.key`` of all sections, of every name in turn; a key of two names comes once for each class."""
    for _, prefix, _, found in every_section():
        for key in found.values():
            yield f"{prefix}.{key.name}", key


def every_section() -> Iterator[tuple[str, str, str, dict[str, Key]]]:
    """A title, the section, the summary of its class, and its keys; in the order of a page."""
    for section in sections():
        if section in PLAIN:
            kind = cls(*PLAIN[section])
            yield section, section, kind.summary, source.keys(kind)
        elif section == "model":
            for worker, kind in names("worker").items():
                settings = kind.attribute("model_section")
                yield f"model, with worker.name={worker}", section, settings.summary, source.keys(settings)
        elif section in NAMED:
            if section == "data":
                kind = cls("fedllm.recipe.sections", "Data")
                yield "data", "data", kind.summary, data_keys()
            for part in (section, "data.partition") if section == "data" else (section,):
                for name, kind in names(part).items():
                    yield f"{part}.name={name}", part, kind.summary, source.keys(kind)
