"""What a node allows: a file that its owner writes, which never leaves the node.

An allow-list builds the node's recipe: the server's page is data to read from, and never loaded as it is.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fedllm.config import plain_yaml
from fedllm.config.schema import parse_section
from fedllm.config.suggest import nearest
from fedllm.config.types import Count, Positive, Whole, needs
from fedllm.errors import FedError
from fedllm.fleets.flower.keys import check_id

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}

MODEL_KEYS = ("name", "revision", "dtype", "quantization")
"""What a node takes of the section ``model``, for language models."""

TEMPLATES = ("prompt_template", "target_template", "stop")
"""Keys of ``data`` that the server may set where the policy says so: a template decides which columns a model sees."""

LOOK = {"train_loss", "steps", "tokens", "seconds"}
"""Metrics that a node tells unless its policy says otherwise."""

Bytes = Annotated[int | str, needs("a number of bytes, such as 200MB")]


@dataclass(frozen=True)
class Most:
    """The most that a node does.

    Args:
        steps: optimizer steps in a round.
        rounds: rounds of a run.
        seconds: of one training; a longer one is not sent.
        bytes_up: of one update.
        bytes_down: of what the server sends for one round.
        max_length: tokens of a row.
        hours_from: it trains from this time of the day on, as "20:00", local time.
        hours_to: until this one.
    """

    steps: Count = 1000
    rounds: Count = 1000
    seconds: Positive = 86400.0
    bytes_up: Bytes = "1GB"
    bytes_down: Bytes = "1GB"
    max_length: Count = 4096
    hours_from: str | None = None
    hours_to: str | None = None


@dataclass(frozen=True)
class Tell:
    """What a node tells beside its updates.

    Args:
        num_samples: its number of rows, ``exact``, or rounded to 100 (``hundreds``); it weighs the update.
        metrics: of each training.
    """

    num_samples: Literal["exact", "hundreds"] = "exact"
    metrics: tuple[str, ...] = tuple(sorted(LOOK))


@dataclass(frozen=True)
class Demand:
    """The privacy that a run must give.

    Args:
        unit: one ``example`` of the node, or the whole ``client``.
        epsilon_at_most: of the whole run.
    """

    unit: Literal["example", "client"] = "example"
    epsilon_at_most: Positive = 8.0


@dataclass(frozen=True)
class Policy:
    """A node's policy.

    Args:
        client: the id under which the server knows it.
        rank: LoRA rank that it trains; 0 for networks that are trained whole.
        level: its capacity, ``b1`` to ``b4``, for rules on sub-models.
        server: host:port of the server's gate.
        insecure: plain HTTP, for a server on this machine.
        port: of the node's own SuperNode, on loopback; 0 takes a free one.
        data: its rows, as in a recipe's section ``data``. ``deal: recipe`` stands for the share of a public corpus that
            the recipe's partition deals to this client: for rehearsals.
        templates: whether the templates of its rows are its ``own`` or the ``server``'s.
        models: that it loads, as NAME or NAME@REVISION; a folder only where it stands here.
        models_download: whether a model may come from the Hub, or must be on the disk already.
        rules: that it follows, by name; their code is the installed one.
        most: bounds.
        tell: what it says beside its updates.
        privacy: what it demands of a run; null demands nothing.
        score: whether it scores the served update on held-out rows of its own.
        ask: a person says yes to each recipe's digest once (``first``); ``always`` takes what the policy allows, and
            ``never`` takes nothing.
        threads: of its training on the CPU.
    """

    client: str
    rank: Whole = 0
    level: str = ""
    server: str = "127.0.0.1:9443"
    insecure: bool = False
    port: Whole = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    templates: Literal["own", "server"] = "own"
    models: tuple[str, ...] = ()
    models_download: bool = False
    rules: tuple[str, ...] = ()
    most: Most = Most()
    tell: Tell = Tell()
    privacy: Demand | None = None
    score: bool = False
    ask: Literal["first", "always", "never"] = "first"
    threads: Count = 1

    @property
    def dealt(self) -> bool:
        """Whether its rows are those that a recipe's partition deals to it."""
        return self.data.get("deal") == "recipe"


class Refused(FedError):
    """What a server asks is not what this node's policy allows."""


def load(path: Path) -> Policy:
    """The policy of a node.

    Raises:
        FedError: it is missing, or a key or value of it is none.
    """
    try:
        policy: Policy = parse_section(Policy, plain_yaml.read(path), "")
        check_id(policy.client)
        for text in (policy.most.bytes_up, policy.most.bytes_down):
            count_bytes(text)
        for clock in (policy.most.hours_from, policy.most.hours_to):
            if clock is not None:
                _minutes(clock)
        if (policy.most.hours_from is None) != (policy.most.hours_to is None):
            raise FedError("most.hours_from and most.hours_to: give both, or neither.")
        if not isinstance(policy.data.get("name"), str):
            raise FedError("data.name is missing: own, or a corpus of `fedllm ls tasks`.")
        if policy.data.get("deal") not in (None, "recipe"):
            raise FedError(f"data.deal={policy.data['deal']!r}: give recipe, or leave it out for rows of your own.")
        return policy
    except OSError as error:
        raise FedError(f"{path} cannot be read: {error.strerror}.") from error
    except FedError as error:
        raise FedError(f"{path}: {error}") from error


def count_bytes(text: int | str) -> int:
    """``200MB`` as a number."""
    found = re.fullmatch(r"\s*(\d{1,15})\s*([kmg]?)b?\s*", str(text).lower())
    if not found:
        raise FedError(f"{text!r}: give a number of bytes, such as 200MB.")
    return int(found[1]) * UNITS[found[2]]


def _minutes(clock: str) -> int:
    found = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", clock)
    if not found:
        raise FedError(f"{clock!r} is no time of the day, such as 20:00.")
    return 60 * int(found[1]) + int(found[2])


def check_hours(policy: Policy, now: datetime.datetime) -> None:
    """Raises Refused outside the hours in which this node trains."""
    if policy.most.hours_from is None or policy.most.hours_to is None:
        return
    begin, end, at = _minutes(policy.most.hours_from), _minutes(policy.most.hours_to), 60 * now.hour + now.minute
    inside = begin <= at < end if begin <= end else at >= begin or at < end
    if not inside:
        raise Refused(
            f"it trains from {policy.most.hours_from} to {policy.most.hours_to}, and it is {now:%H:%M} there."
        )


def node_page(policy: Policy, page: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's page that this node would run: taken key by key from the server's, the rest its own.

    Raises:
        Refused: the server asks for what the policy does not allow.
    """
    sections = {name: _section(page, name) for name in page}
    algorithm, worker, run = sections.get("algorithm", {}), sections.get("worker", {}), sections.get("run", {})
    rule = str(algorithm.get("name", "fedhl"))
    if rule not in policy.rules:
        raise Refused(f"algorithm.name={rule[:60]}: its policy's rules are {_listed(policy.rules)}.")
    taken: dict[str, Any] = {
        "run": {key: run[key] for key in ("seed", "rounds") if key in run} | {"tracker": "none"},
        "algorithm": algorithm,
        "model": _model(policy, sections.get("model", {}), str(worker.get("name", "sft"))),
        "data": _data(policy, sections.get("data", {})),
        "clients": _clients(policy, sections.get("clients", {})),
        "worker": worker,
        "eval": {"generate": False, "base": False},
    }
    taken |= {name: sections[name] for name in ("wire", "privacy", "local") if name in sections}
    for key, asked, most in (
        ("run.rounds", run.get("rounds", 1), policy.most.rounds),
        ("worker.max_length", worker.get("max_length", 0), policy.most.max_length),
        ("worker.steps", worker.get("steps") or 0, policy.most.steps),
    ):
        if not isinstance(asked, int) or asked > most:
            raise Refused(f"{key}={str(asked)[:40]}: its policy allows {most} at most.")
    _check_privacy(policy, sections.get("privacy", {}))
    return taken


def _section(page: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = page[name]
    if not isinstance(section, Mapping):
        raise Refused(f"{str(name)[:60]} is no section of keys.")
    return dict(section)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) if names else "none"


def _model(policy: Policy, model: Mapping[str, Any], worker: str) -> dict[str, Any]:
    """The model, where it is listed."""
    name, revision = str(model.get("name", "")), model.get("revision")
    wanted = name if revision is None else f"{name}@{revision}"
    if wanted not in policy.models:
        raise Refused(
            f"model {wanted[:120]} is not one of its policy's models: {_listed(policy.models)}. Its owner would add "
            f"the line {wanted[:120]!r}."
        )
    for key in ("config", "own"):
        if model.get(key):
            raise Refused(f"model.{key} is not taken from a server.")
    if worker == "vision":  # a network is made here from numbers
        return dict(model)
    return {key: model[key] for key in MODEL_KEYS if key in model}


def _data(policy: Policy, data: Mapping[str, Any]) -> dict[str, Any]:
    """The node's own rows; no path comes from a server."""
    own = {key: value for key, value in policy.data.items() if key != "deal"}
    if policy.dealt:
        if data.get("name") != own["name"]:
            raise Refused(f"data.name={str(data.get('name'))[:60]}, and its policy has {own['name']}.")
        return {**{key: value for key, value in data.items() if key not in {"path", "hub", "score", "clients"}}, **own}
    if policy.templates == "server":
        own |= {key: data[key] for key in TEMPLATES if data.get(key) is not None}
    if "path" in own and own["name"] == "own":
        own["clients"] = {policy.client: own.pop("path")}
    return own


def _clients(policy: Policy, clients: Mapping[str, Any]) -> dict[str, Any]:
    """Itself alone; or all that the recipe deals to."""
    if policy.dealt:
        return dict(clients)
    alone: dict[str, Any] = {"rank": policy.rank} if policy.rank else {}
    return alone | ({"levels": [policy.level]} if policy.level else {})


def _check_privacy(policy: Policy, privacy: Mapping[str, Any]) -> None:
    """Raises Refused where a run gives less privacy than is demanded."""
    demand = policy.privacy
    if demand is None:
        return
    unit, epsilon = privacy.get("unit", "none"), privacy.get("epsilon")
    if unit != demand.unit or not isinstance(epsilon, int | float) or not epsilon <= demand.epsilon_at_most:
        raise Refused(
            f"its policy demands privacy.unit={demand.unit} with privacy.epsilon={demand.epsilon_at_most:g} at most, "
            f"and the run has privacy.unit={str(unit)[:20]}, privacy.epsilon={str(epsilon)[:20]}."
        )


def check_client(policy: Policy, rank: int, steps: int) -> None:
    """Raises Refused where the client that a recipe makes of this node does more than the policy allows."""
    if rank > policy.rank:
        raise Refused(f"the recipe gives it rank {rank}, and its policy allows {policy.rank} at most.")
    if steps > policy.most.steps:
        raise Refused(f"it would take {steps} steps a round, and its policy allows {policy.most.steps} at most.")


def known_rule(name: str, table: Mapping[str, object]) -> None:
    """Raises FedError where a policy lists a rule that is not installed."""
    if name not in table:
        raise FedError(f"rules: {name}: {nearest(name, table, 'rule')}")


TEMPLATE = """# What this node allows; it is never sent. What it makes of a recipe: fedllm join FOLDER --dry-run RECIPE
client: {client}
server: {server}
rank: 8                       # the LoRA rank that this machine trains
data:                         # the only place that a path comes from
  name: alpaca                # columns instruction, input, output
  path: rows.jsonl
  held_out: 20                # rows of it that are not trained on
models: []                    # exact names, such as HuggingFaceTB/SmolLM2-135M-Instruct, or NAME@REVISION
models_download: false        # true: a listed model may come from the Hub
rules: [fedhl, flexlora, flora, zero_padding, fedit]
most: {{steps: 500, rounds: 100, seconds: 7200, bytes_up: 200MB, max_length: 1024}}
tell: {{num_samples: exact, metrics: [train_loss, steps, seconds]}}
score: false                  # true: scores the served model on held-out rows of its own
ask: first                    # a person approves each recipe once; or always, never
{more}"""
