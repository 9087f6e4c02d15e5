"""Recipes: one YAML page each, typed and strict, and ``a.b=c`` overrides.

A section whose meaning depends on a name (``algorithm``, ``data``, ``data.partition``, ``worker``) becomes the frozen
dataclass that a table gives for that name, so its keys are the dataclass's fields and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from fedllm.algorithms import ALGORITHMS
from fedllm.config.suggest import closest, nearest
from fedllm.config.types import Count, Positive, Seed, Share, SomeShare, Whole, needs
from fedllm.core import Algorithm, FedError
from fedllm.data.partition import IID, PARTITIONS
from fedllm.fleets.faults import Faults
from fedllm.rounds import Policy
from fedllm.server.robust import ROBUST, Trust
from fedllm.tasks import TASKS
from fedllm.wire.compression import Wire
from fedllm.workers import WORKERS

SECTIONS = (
    "run",
    "algorithm",
    "model",
    "data",
    "clients",
    "worker",
    "eval",
    "hub",
    "admission",
    "robust",
    "faults",
    "wire",
)

PROFILES = {
    "moderate": (32, 24, 20, 16, 16, 12, 12, 12, 8, 8),
    "high": (64, 32, 16, 16, 8, 8, 4, 4, 4, 4),
    "extremely_high": (64, 64, 4, 4, 4, 4, 4, 4, 4, 4),
    "homogeneous": (16,) * 10,
}
"""The rank profiles of FedHL, section VI: ten clients; a hundred are each of them ten times."""


@dataclass(frozen=True)
class Run:
    """The run itself.

    Args:
        rounds: communication rounds, ``T``.
        output: the run's folder; ``runs/NAME`` of the recipe by default.
        resume: continue from the last finished round in that folder.
        overwrite: delete an earlier run there first.
        seed: of everything: weights of a random model, partition, cohorts, client training.
        plan: print who would train what, and stop.
        parallel: what several processes do: each trains ``clients`` of its own; or all train one client at a time, each
            on its part of every step's rows, with a copy of the base model (``ddp``) or a shard of it (``fsdp``).
        threads: of each process on the CPU; by default its share of the cores (``accelerate launch`` gives 1).
        quorum: share of a cohort whose updates must be usable, in [0, 1]; one update is needed in any case.
        attempts: how often a round is tried, each time with another cohort, before the run ends for want of a quorum.
        deadline: seconds after which a client's update is too late; ``null`` waits for everybody.
        on_client_error: an exception in a client's training, out of memory included, fails that client (``refuse``) or
            ends the run with the traceback (``stop``).
        tracker: where the server logs the federation: ``auto`` is trackio, in the run's folder, where it is installed.
    """

    rounds: Count = 1
    output: str | None = None
    resume: bool = False
    overwrite: bool = False
    seed: Seed = 0
    plan: bool = False
    parallel: Literal["clients", "ddp", "fsdp"] = "clients"
    threads: Count | None = None
    quorum: Share = 0.0
    attempts: Count = 3
    deadline: Positive | None = None
    on_client_error: Literal["refuse", "stop"] = "refuse"
    tracker: Literal["auto", "none", "trackio", "tensorboard", "wandb"] = "auto"


@dataclass(frozen=True)
class Clients:
    """Who takes part.

    Args:
        rank: one rank for all, one rank each, or a profile of the FedHL paper by name.
        count: how many clients; by default as many as ranks are given. A profile or list is stretched evenly to it.
        participation: share of the clients that a round's cohort holds, in (0, 1].
        levels: capacity levels, assigned in equal blocks (sub-model algorithms).
    """

    rank: Annotated[Count | tuple[Count, ...] | str, needs("a rank from 1 up, a list of them, or a profile's name")] = 8
    count: Count | None = None
    participation: SomeShare = 1.0
    levels: tuple[str, ...] = ()

    def ranks(self) -> list[int]:
        """One rank per client."""
        if isinstance(self.rank, int):
            ranks: Sequence[int] = [self.rank] * (self.count or 1)
        elif isinstance(self.rank, str):
            if self.rank not in PROFILES:
                raise FedError(f"clients.rank={self.rank}: {nearest(self.rank, PROFILES, 'rank profile')}")
            ranks = PROFILES[self.rank]
        else:
            ranks = self.rank
        if not ranks or min(ranks) < 1:
            raise FedError(f"clients.rank={self.rank}: a rank is a whole number from 1 up.")
        count = self.count or len(ranks)
        if count % len(ranks):
            raise FedError(
                f"clients.count={count} clients cannot share {len(ranks)} ranks evenly: give a multiple of it."
            )
        return [rank for rank in ranks for _ in range(count // len(ranks))]


@dataclass(frozen=True)
class Data:
    """Which rows, and who holds them.

    Args:
        task: the corpus with its prompt, target and scores (``data.name`` and the task's own keys).
        path: a local file or folder instead of the Hub.
        train_rows: use this many training rows at most, the first of a seeded shuffle.
        test_rows: score this many test rows at most, likewise.
        partition: how the training rows are dealt out to the clients.
    """

    task: Any
    path: str | None = None
    train_rows: Count | None = None
    test_rows: Count | None = None
    partition: Any = IID()


@dataclass(frozen=True)
class Evaluation:
    """Scores inside the run, of the update that the server would serve.

    Args:
        every: evaluate after every so many rounds; the last round always. 0: the last round only.
        base: score the untouched model too, before round 1.
        generate: generate answers and score them; the held-out loss alone otherwise.
        clients: score each client's own model of the last round too.
        alone: also train this client by itself, for as many steps as in the federation; or several, or ``all``.
        batch_size: rows generated at once.
        max_new_tokens: cut an answer off here; the task's own limit by default.
        allow_code_execution: run the programs that the model writes, in the sandbox, where the task's score is that.
        accept_missing: guarantees of the sandbox to do without where this machine does not give them.
    """

    every: Whole = 0
    base: bool = True
    generate: bool = True
    clients: bool = False
    alone: Annotated[
        Whole | tuple[Whole, ...] | Literal["all"] | None, needs("a client's number from 0 up, a list of them, all")
    ] = None
    batch_size: Count = 32
    max_new_tokens: Count | None = None
    allow_code_execution: bool = False
    accept_missing: tuple[str, ...] = ()

    def alone_of(self, count: int) -> list[int]:
        """The places, among ``count`` clients, of those that also train by themselves."""
        if self.alone is None:
            return []
        if self.alone == "all":
            return list(range(count))
        return [self.alone] if isinstance(self.alone, int) else list(self.alone)


@dataclass(frozen=True)
class Hub:
    """What a run ends in, and what the Hugging Face Hub gets of it. The token is never a key: ``hf auth login``.

    Args:
        push: upload the adapter with its model card when the run is done.
        repo: ``owner/name``; made where it does not exist.
        private: make it so, and refuse one that is public.
        dry_run: list what would be uploaded, and upload nothing.
        merged: end in the merged model too, in the run's ``merged/``; an upload then has the adapter in ``adapter/``.
        clients: keep and upload each client's own adapter of the last round too.
        dtype: of the merged model; ``auto`` is the base model's.
        license: of what is uploaded; the base model's by default, where it is known.
    """

    push: bool = False
    repo: str | None = None
    private: bool = True
    dry_run: bool = False
    merged: bool = False
    clients: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    license: str | None = None


@dataclass(frozen=True)
class Admission:
    """What an update must be, beyond its names, shapes, ranks and finite values.

    Args:
        norm_bound: refuse an update that moved this many times as far as the cohort's median; ``null``: none is too
            far.
    """

    norm_bound: Positive | None = None


@dataclass(frozen=True)
class Recipe:
    """All of one run. Frozen, complete, and printable: what is not written in the page is the default here."""

    name: str
    run: Run
    algorithm: Algorithm
    algorithm_name: str
    model: Any
    data: Data
    data_name: str
    clients: Clients
    worker: Any
    worker_name: str
    eval: Evaluation = field(default_factory=Evaluation)
    hub: Hub = field(default_factory=Hub)
    admission: Admission = Admission()
    robust_name: str = "none"
    robust: Trust = Trust()
    faults: Faults = Faults()
    wire: Wire = Wire()
    page: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def policy(self) -> Policy:
        """What a round needs to count."""
        run = self.run
        return Policy(run.quorum, run.attempts, run.deadline, self.admission.norm_bound, self.robust)

    @property
    def models(self) -> str:
        """What clients train, by name: the model of all of them, or their own."""
        return ", ".join(dict.fromkeys(self.model.own)) or self.model.name

    @property
    def output(self) -> Path:
        return Path(str(self.run.output))


def load(arguments: Sequence[str]) -> Recipe:
    """The recipe of ``recipe=NAME`` and ``a.b=c`` arguments.

    Raises:
        FedError: an unknown recipe, key or name, or a value of the wrong type, with the nearest valid one.
    """
    name, overrides = _arguments(arguments)
    path = find(name)
    try:
        page: Any = OmegaConf.load(path)
        if not OmegaConf.is_dict(page):
            raise FedError(f"{path}: a recipe is a YAML page of sections (run, algorithm, model, ...).")
        # names are checked one by one below: a typo is answered with the nearest key, not merged in silently
        asked = [_override(argument) for argument in overrides]
        _leave_behind(page, OmegaConf.merge(*asked) if asked else OmegaConf.create())
        for argument, part in zip(overrides, asked, strict=True):
            page = _merged(page, part, argument)
        resolved: Any = OmegaConf.to_container(page, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise FedError(f"recipe {name}: {said(error)}") from error
    return build(path.stem, resolved)


def said(error: Exception) -> str:
    """A parser's message in one line, with the line of the page that it is about."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return f"{error.problem}{f' (line {mark.line + 1})' if mark else ''}."
    return str(error).splitlines()[0]


def _merged(page: Any, part: Any, argument: str) -> Any:
    try:
        return OmegaConf.merge(page, part)
    except TypeError as error:  # a list for keys, or the other way round
        raise FedError(f"{argument!r} does not fit: the recipe has another kind of value there.") from error


def _override(argument: str) -> Any:
    """One ``a.b=c`` as a page of its own.

    Raises:
        FedError: where its value is no YAML, or is one value for a whole section.
    """
    key, _, value = argument.partition("=")
    try:
        page = OmegaConf.from_dotlist([argument])
        if value.strip() == "???":
            raise FedError(f"{argument}: ??? stands for a missing value, give one.")
        if key in SECTIONS:
            _section(OmegaConf.to_container(page)[key] or value, key)  # type: ignore[call-overload, index]
        return page
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise FedError(
            f"{argument!r} is not understood: {said(error)} A text with marks in it goes into quotes, {key}='\"...\"'."
        ) from error


def build(name: str, page: Mapping[str, Any]) -> Recipe:
    """The recipe that a resolved page of plain values describes."""
    _known(page, SECTIONS, "")
    run = typed(Run, page.get("run"), "run")
    run = dataclasses.replace(run, output=run.output or f"runs/{name}")
    algorithm_name, algorithm = _named(ALGORITHMS, page.get("algorithm"), "algorithm", default="fedhl")
    robust_name, robust = _named(ROBUST, page.get("robust"), "robust", default="none")
    worker_name, worker = _named(WORKERS, page.get("worker"), "worker", default="sft")
    own = _section(page.get("data"), "data")
    common = {f.name for f in dataclasses.fields(Data)} - {"task"}
    shared = {key: own.pop(key) for key in list(own) if key in common}
    made = {f.name for f in dataclasses.fields(TASKS[own["name"]])} if own.get("name") in TASKS else set()
    own |= {key: value for key, value in shared.items() if key in made and value is not None}  # rows made to order
    partition_name, shared["partition"] = _named(PARTITIONS, shared.get("partition"), "data.partition", default="iid")
    data_name, task = _named(TASKS, own, "data", default=None, also=common)
    data = typed(Data, {"task": task, **shared}, "data")
    wire = typed(Wire, page.get("wire"), "wire")
    recipe = Recipe(
        name=name,
        run=run,
        algorithm=wire.around(algorithm),
        algorithm_name=algorithm_name,
        model=typed(worker.model_section, page.get("model"), "model"),
        data=data,
        data_name=data_name,
        clients=typed(Clients, page.get("clients"), "clients"),
        worker=worker,
        worker_name=worker_name,
        eval=typed(Evaluation, page.get("eval"), "eval"),
        hub=typed(Hub, page.get("hub"), "hub"),
        admission=typed(Admission, page.get("admission"), "admission"),
        robust_name=robust_name,
        robust=robust,
        faults=typed(Faults, page.get("faults"), "faults"),
        wire=wire,
    )
    _belong_together(recipe)
    _in_range(recipe)
    return dataclasses.replace(recipe, page=_page(recipe, partition_name))


def find(name: str) -> Path:
    """A recipe's page: a path to a YAML file, or a name in ``recipes/`` of the checkout or the installed package."""
    if Path(name).suffix in {".yaml", ".yml"}:
        if not Path(name).is_file():
            raise FedError(f"recipe={name}: there is no such file.")
        return Path(name)
    pages = {page.stem: page for folder in folders() for page in sorted(folder.glob("*.yaml"))}
    if name not in pages:
        path = "A page of your own is a path that ends in .yaml. " if Path(name).exists() else ""
        raise FedError(f"recipe={name}: {path}{nearest(name, pages, 'recipe')}")
    return pages[name]


def folders() -> list[Path]:
    """Where recipes lie: inside the installed package, and beside it in a checkout, which wins."""
    package = Path(__file__).resolve().parents[1]
    return [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]


def dump(recipe: Recipe) -> str:
    """The resolved page: ``recipe=THIS_FILE.yaml`` is the same run."""
    return yaml.safe_dump(dict(recipe.page), sort_keys=False, allow_unicode=True)


def _arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    name, overrides = None, []
    for argument in arguments:
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


def _leave_behind(page: Any, asked: Any) -> None:
    """Where an override names another rule, model, task or worker, what the page says of the one it had goes."""
    data = {f.name for f in dataclasses.fields(Data)}
    owned: dict[str, Callable[[str], bool]] = {
        "algorithm": lambda key: True,
        "worker": lambda key: True,
        "data": lambda key: key not in data,
        "data.partition": lambda key: True,
        "model": lambda key: key in {"config", "revision"},
    }
    for where, belongs in owned.items():
        section, name = OmegaConf.select(page, where), OmegaConf.select(asked, f"{where}.name")
        if OmegaConf.is_dict(section) and name and name != section.get("name"):
            for key in [key for key in section if belongs(key)]:
                del section[key]


def _section(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FedError(f"{where}={value!r}: this is a section of keys, such as {where}.name=..., not one value.")
    return dict(value)


def _named(
    table: Mapping[str, type], value: Any, where: str, default: str | None, also: Iterable[str] = ()
) -> tuple[str, Any]:
    section = _section(value, where)
    name = section.pop("name", default)
    if name is None:
        raise FedError(f"{where}.name is missing. One of: {', '.join(sorted(table))}.")
    if name not in table:
        raise FedError(f"{where}.name={name}: {nearest(str(name), table, where.rpartition('.')[2])}")
    return name, typed(table[name], section, where, also={"name", *also})


def typed(kind: type, value: Any, where: str, also: Iterable[str] = ()) -> Any:
    """The frozen dataclass ``kind`` with a section's values. Raises FedError for an unknown key or a wrong type."""
    section = _section(value, where)
    _known(section, [*(f.name for f in dataclasses.fields(kind)), *also], where)
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
        case "value_error":  # the words of `fedllm.config.types.needs`
            return fault["msg"].removeprefix("Value error, ")
    return fault["msg"].removeprefix("Input should be ").replace("a valid ", "a ")


def _strict(kind: type) -> type:
    with_config(ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False))(kind)
    return kind


def _known(section: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    valid = list(valid)
    for key in section:
        if key not in valid:
            full = f"{where}.{key}" if where else str(key)
            near = closest(str(key), valid)
            hint = (
                f"Did you mean {where + '.' if where else ''}{near}?" if near else f"Valid: {', '.join(sorted(valid))}."
            )
            raise FedError(f"{full} is not a key of a recipe. {hint}")


def _belong_together(recipe: Recipe) -> None:
    """A rule on networks, the worker that trains them and the data it takes; or adapters and text."""
    if not isinstance(recipe.data.task, recipe.worker.task_kind):
        fit = [name for name, kind in TASKS.items() if issubclass(kind, recipe.worker.task_kind)]
        raise FedError(
            f"data.name={recipe.data_name} is nothing that worker.name={recipe.worker_name} trains on: "
            f"take another worker ({', '.join(WORKERS)}), or one of {', '.join(fit)}."
        )
    fit = [name for name, rule in ALGORITHMS.items() if _trains(recipe.worker.whole, rule)]
    if not _trains(recipe.worker.whole, recipe.algorithm):
        kind = "networks" if recipe.worker.whole else "low-rank updates of language models"
        raise FedError(
            f"algorithm.name={recipe.algorithm_name} does not train what worker.name={recipe.worker_name} trains "
            f"({kind}): take one of {', '.join(fit)}."
        )


def _trains(whole: bool, rule: Algorithm | type[Algorithm]) -> bool:
    """Whether a rule can be had of a worker that trains networks (``whole``), or of one that trains adapters."""
    return rule.any_model or (bool(rule.network) if whole else rule.low_rank or not rule.network)


def _in_range(recipe: Recipe) -> None:
    checks = [
        (
            recipe.run.parallel == "clients" or not recipe.worker.whole,
            f"run.parallel={recipe.run.parallel} spreads a client that worker.name=sft trains; the networks of "
            f"worker.name={recipe.worker_name} are small: run.parallel=clients.",
        ),
        (
            recipe.run.parallel != "fsdp" or getattr(recipe.model, "quantization", "none") == "none",
            "run.parallel=fsdp shards plain weights, bitsandbytes' packed ones cannot be: set model.quantization=none, "
            "or take run.parallel=ddp, which gives every process a quantised copy.",
        ),
        (not recipe.hub.push or recipe.hub.repo, "hub.push=true needs hub.repo=OWNER/NAME: where to upload to."),
    ]
    count = len(recipe.clients.ranks())
    alone = recipe.eval.alone_of(count)
    inside = all(0 <= place < count for place in alone)
    checks.append((inside, f"eval.alone={recipe.eval.alone}: the clients are 0 to {count - 1}."))
    for holds, message in checks:
        if not holds:
            raise FedError(message)


def _page(recipe: Recipe, partition: str) -> dict[str, Any]:
    """Every key with its value, in the order of the sections, as plain YAML values."""
    data = {k: v for k, v in _plain(recipe.data).items() if k not in {"task", "partition"}}
    return {
        "run": _plain(recipe.run) | {"plan": False, "resume": False},
        "algorithm": {"name": recipe.algorithm_name} | _plain(recipe.wire.inside(recipe.algorithm)),
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
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
