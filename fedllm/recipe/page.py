"""Recipes: one YAML page each, typed and strict, and ``a.b=c`` overrides.

A section whose meaning depends on a name (``algorithm``, ``data``, ``data.partition``, ``worker``) becomes the frozen
dataclass that a table gives for that name, so its keys are the dataclass's fields and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from fedllm.algorithms import ALGORITHMS
from fedllm.algorithms.compositions.local_step import LocalStep
from fedllm.algorithms.compositions.server_step import Server
from fedllm.config import plain_yaml
from fedllm.config.arguments import spelled
from fedllm.config.pages import find, folders
from fedllm.config.paths import absolute
from fedllm.config.schema import as_section, parse_named, parse_section, refuse_unknown_keys
from fedllm.core import innermost
from fedllm.data.partition import PARTITIONS
from fedllm.errors import FedError
from fedllm.fleets.faults import Faults
from fedllm.models.language import LanguageModel, located
from fedllm.privacy.settings import Privacy
from fedllm.recipe.checks import check_compatible, check_values
from fedllm.recipe.privacy_checks import check_privacy
from fedllm.recipe.sections import SECTIONS, Admission, Clients, Data, Evaluation, Hub, Recipe, Run
from fedllm.server.robust import ROBUST
from fedllm.tasks import TASKS
from fedllm.wire.compression import Wire
from fedllm.workers import WORKERS


def load(arguments: Sequence[str]) -> Recipe:
    """The recipe of ``recipe=NAME`` and ``a.b=c`` arguments.

    Raises:
        FedError: an unknown recipe, key or name, or a value of the wrong type, with the nearest valid one.
    """
    name, overrides = _arguments(arguments)
    path = find(name)
    try:
        page = plain_yaml.read(path)
    except FedError as error:
        raise FedError(f"recipe {name}: {error}") from error
    if not isinstance(page, Mapping):
        raise FedError(f"{path}: a recipe is a YAML page of sections (run, algorithm, model, ...).")
    # names are checked one by one below: a typo is answered with the nearest key, not merged in silently
    asked = [_override(argument) for argument in overrides]
    together: Mapping[str, Any] = {}
    for argument, part in zip(overrides, asked, strict=True):
        together = _merged(together, part, argument)
    page = _without_replaced(page, together)
    for argument, part in zip(overrides, asked, strict=True):
        page = _merged(page, part, argument)
    return build(path.stem, page)


def _merged(page: Mapping[str, Any], part: Mapping[str, Any], argument: str) -> dict[str, Any]:
    try:
        return plain_yaml.merged(page, part)
    except TypeError as error:  # a list for keys, or the other way round
        raise FedError(f"{argument!r} does not fit: the recipe has another kind of value there.") from error


def _override(argument: str) -> dict[str, Any]:
    """One ``a.b=c`` as a page of its own.

    Raises:
        FedError: where its value is no YAML, or is one value for a whole section.
    """
    key, _, value = argument.partition("=")
    if value.strip() == "???":
        raise FedError(f"{argument}: ??? stands for a missing value, give one.")
    try:
        page = plain_yaml.assignment(argument)
    except FedError as error:
        raise FedError(
            f"{argument[:200]!r} is not understood: {error} A text with marks in it goes into quotes, {key}='\"...\"'."
        ) from error
    if key in SECTIONS:
        as_section(page[key] or value, key)
    return page


def build(name: str, page: Mapping[str, Any]) -> Recipe:
    """The recipe that a resolved page of plain values describes."""
    refuse_unknown_keys(page, SECTIONS, "")
    privacy = parse_section(Privacy, page.get("privacy"), "privacy")
    asked = as_section(page.get("run"), "run")
    if privacy.unit == "client":  # a round that is repeated tells who was missing
        asked = {"attempts": 1, **asked}
    run = parse_section(Run, asked, "run")
    run = dataclasses.replace(run, output=run.output or f"runs/{name}")
    algorithm_name, algorithm = parse_named(ALGORITHMS, page.get("algorithm"), "algorithm", default="fedhl")
    robust_name, robust = parse_named(ROBUST, page.get("robust"), "robust", default="none")
    worker_name, worker = parse_named(WORKERS, page.get("worker"), "worker", default="sft")
    own = as_section(page.get("data"), "data")
    common = {f.name for f in dataclasses.fields(Data)} - {"task"}
    shared = {key: own.pop(key) for key in list(own) if key in common}
    made = {f.name for f in dataclasses.fields(TASKS[own["name"]])} if _known(own.get("name"), TASKS) else set()
    own |= {key: value for key, value in shared.items() if key in made and value is not None}  # rows made to order
    partition_name, shared["partition"] = parse_named(
        PARTITIONS, shared.get("partition"), "data.partition", default="iid"
    )
    data_name, task = parse_named(TASKS, own, "data", default=None, also=common)
    data = parse_section(Data, {"task": task, **shared}, "data")
    data = dataclasses.replace(data, path=None if data.path is None else absolute(data.path))
    model = parse_section(worker.model_section, page.get("model"), "model")
    wire = parse_section(Wire, page.get("wire"), "wire")
    server = parse_section(Server, page.get("server"), "server")
    local = parse_section(LocalStep, page.get("local"), "local")
    recipe = Recipe(
        name=name,
        run=run,
        algorithm=wire.around(server.around(local.around(algorithm))),
        algorithm_name=algorithm_name,
        model=located(model) if isinstance(model, LanguageModel) else model,
        data=data,
        data_name=data_name,
        clients=parse_section(Clients, page.get("clients"), "clients"),
        worker=worker,
        worker_name=worker_name,
        eval=parse_section(Evaluation, page.get("eval"), "eval"),
        hub=parse_section(Hub, page.get("hub"), "hub"),
        admission=parse_section(Admission, page.get("admission"), "admission"),
        robust_name=robust_name,
        robust=robust,
        faults=parse_section(Faults, page.get("faults"), "faults"),
        wire=wire,
        server=server,
        local=local,
        privacy=privacy,
    )
    check_compatible(recipe)
    check_values(recipe)
    check_privacy(recipe)
    return dataclasses.replace(recipe, page=_page(recipe, partition_name))


def _known(name: Any, table: Mapping[str, Any]) -> bool:
    return isinstance(name, str) and name in table


def dump(recipe: Recipe) -> str:
    """The resolved page: ``recipe=THIS_FILE.yaml`` is the same run."""
    return yaml.safe_dump(dict(recipe.page), sort_keys=False, allow_unicode=True)


def _arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    name, overrides = None, []
    for argument in spelled(arguments):
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise FedError(f"{argument!r} is not understood: give recipe=NAME and then a.b=c overrides.")
        if key == "recipe":
            if name is not None:
                raise FedError(f"recipe={name} and recipe={value}: a run has one recipe.")
            name = value
        else:
            overrides.append(argument)
    if not name:
        pages = sorted({page.stem for folder in folders() for page in folder.glob("*.yaml")})
        raise FedError(f"which recipe? Give recipe=NAME, one of: {', '.join(pages)}.")
    return name, overrides


def _without_replaced(page: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Drops what the page says of a rule, model, task or worker where an override names another one."""
    data = {f.name for f in dataclasses.fields(Data)}
    owned: dict[str, Callable[[str], bool]] = {
        "algorithm": lambda key: True,
        "worker": lambda key: True,
        "data": lambda key: key not in data,
        "model": lambda key: key in {"config", "revision"},
    }
    kept = {section: _kept(page.get(section), asked.get(section), owned.get(section)) for section in page}
    section, other = kept.get("data"), asked.get("data")
    if isinstance(section, Mapping) and isinstance(other, Mapping):
        partition = _kept(section.get("partition"), other.get("partition"), lambda key: True)
        kept["data"] = {**section, "partition": partition} if "partition" in section else section
    return kept


def _kept(section: Any, asked: Any, belongs: Callable[[str], bool] | None) -> Any:
    """The section, without the keys that belong to its ``name`` where ``asked`` names another."""
    if belongs is None or not isinstance(section, Mapping) or not isinstance(asked, Mapping):
        return section
    name = asked.get("name")
    if not name or name == section.get("name"):
        return section
    return {key: value for key, value in section.items() if not belongs(key)}


def _page(recipe: Recipe, partition: str) -> dict[str, Any]:
    """Every key with its value, in the order of the sections, as plain YAML values."""
    data = {k: v for k, v in _plain(recipe.data).items() if k not in {"task", "partition"}}
    return {
        "run": _plain(recipe.run) | {"plan": False, "resume": False},
        "algorithm": {"name": recipe.algorithm_name} | _plain(innermost(recipe.algorithm)),
        "model": _plain(recipe.model),
        "data": {"name": recipe.data_name}
        | _plain(recipe.data.task)
        | data
        | {"partition": {"name": partition} | _plain(recipe.data.partition)},
        "clients": _plain(recipe.clients),
        "worker": {"name": recipe.worker_name} | _plain(recipe.worker),
        "eval": _plain(recipe.eval),
        "hub": _plain(recipe.hub),
        "admission": _plain(recipe.admission),
        "robust": {"name": recipe.robust_name} | _plain(recipe.robust),
        "faults": _plain(recipe.faults),
        "wire": _plain(recipe.wire),
        "server": _plain(recipe.server),
        "local": _plain(recipe.local),
        "privacy": _plain(recipe.privacy),
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
