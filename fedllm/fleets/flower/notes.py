"""The messages between a server and its nodes, version 1: JSON notes beside packed tensors.

``hello`` brings the recipe's page and is answered by the client that the node stands for. ``train`` names the page by
its digest and is answered by an update. ``score`` brings an update and is answered by its scores on the node's rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import fedllm
from fedllm.core import Client, Round, Tensors
from fedllm.errors import FedError
from fedllm.storage.checkpoint import FREE
from fedllm.wire.serialization import digest

NOTE_BYTES = 1 << 20
"""The longest note that is read."""

LIBRARIES = ("torch", "transformers", "peft", "trl")
"""The libraries whose versions decide the bits of a training."""

MEMORY = "ref"
"""The name under which the server keeps the digest of what a client remembers."""

REASON = 300
"""Characters of a reason that are kept: it comes from another machine."""


def versions() -> dict[str, str]:
    """What hello compares."""
    found = {"fedllm": fedllm.__version__}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = ""
    return found


def version_sentence(here: Mapping[str, str], there: Mapping[str, str]) -> tuple[str, str]:
    """Why two sets of versions do not work together, and what is only worth a note; empty where nothing is."""
    refused, noted = [], []
    for name, mine in here.items():
        other = str(there.get(name, ""))[:40]
        if mine.split(".")[:2] != other.split(".")[:2]:
            refused.append(f"{name} {other or 'missing'} there, {mine} here")
        elif mine != other:
            noted.append(f"{name} {other} there, {mine} here")
    return "; ".join(refused), "; ".join(noted)


def public_page(page: Mapping[str, Any]) -> dict[str, Any]:
    """All in a page that decides a training: without what may change when a run goes on, but for its rounds."""
    kept = {
        section: {
            key: value for key, value in keys.items() if f"{section}.{key}" not in FREE | {"run.resume", "run.plan"}
        }
        for section, keys in page.items()
        if section not in FREE
    }
    kept["run"] |= {"rounds": page["run"]["rounds"]}  # schedules follow it
    return kept


def recipe_digest(page: Mapping[str, Any]) -> str:
    """32 hex digits of a page's public part."""
    return _hash(json.dumps(public_page(page), sort_keys=True))


def job_key(recipe: str, run: str, rnd: Round, client: str, sent: Tensors, memory: str) -> str:
    """The name of one client's part of one attempt at one round; pushed twice, it is trained once."""
    return _hash(json.dumps([recipe, run, rnd.index, rnd.attempt, client, digest(sent), memory]))


def wide_digest(packed: bytes) -> str:
    """The name of what a client remembers."""
    return hashlib.blake2b(packed, digest_size=16).hexdigest()


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def as_memory(reference: str) -> dict[str, Tensor]:
    """A digest in the place of what a client remembers, for checkpoints to keep; nothing where it remembers nothing."""
    return {MEMORY: torch.tensor(list(reference.encode()), dtype=torch.uint8)} if reference else {}


def of_memory(memory: Tensors) -> str:
    """The digest that ``as_memory`` put there."""
    return bytes(memory[MEMORY].tolist()).decode("ascii") if memory else ""


def is_digest(text: object) -> bool:
    """Whether a text may name a file of ours."""
    return isinstance(text, str) and len(text) == 32 and set(text) <= set("0123456789abcdef")


def client_note(client: Client) -> dict[str, Any]:
    """A client as it travels."""
    return {key: value for key, value in dataclasses.asdict(client).items() if value != ""}


def read_client(note: Any) -> Client:
    """The client that a node says it stands for.

    Raises:
        ValueError: it is none, or its numbers are none.
    """
    if not isinstance(note, dict) or not {"id", "num_samples"} <= note.keys() <= {f.name for f in FIELDS}:
        raise ValueError("it names no client")
    client = Client(**note)
    whole = {"num_samples": client.num_samples, "rank": client.rank}
    for name, value in whole.items():
        if type(value) is not int or not 0 <= value < 2**31:
            raise ValueError(f"its {name} is no whole number")
    if client.num_samples < 1:
        raise ValueError("it has no rows")
    if not isinstance(client.id, str) or not isinstance(client.level, str):
        raise ValueError("its id is no text")
    width = client.width
    if type(width) not in (int, float) or not 0 < width <= 1:
        raise ValueError("its width is no share")
    if client.depth is not None and (type(client.depth) is not int or client.depth < 1):
        raise ValueError("its depth is no whole number")
    return client


FIELDS = dataclasses.fields(Client)


def read_round(note: Any) -> Round:
    """The round that a job is of.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(note, dict) or set(note) != {f.name for f in dataclasses.fields(Round)}:
        raise ValueError("it names no round")
    if any(type(value) is not int or not 0 <= value < 2**32 for value in note.values()):
        raise ValueError("its round is no number")
    return Round(**note)


def read_metrics(note: Any) -> dict[str, float]:
    """The finite numbers of a reply's metrics, under names of letters; the rest is dropped."""
    if not isinstance(note, dict):
        return {}
    return {
        name: value
        for name, value in list(note.items())[:64]
        if isinstance(name, str)
        and name.isidentifier()
        and len(name) <= 64
        and type(value) in (int, float)
        and math.isfinite(value)
    }


def reason(text: object) -> str:
    """A reason from another machine, on one line of printable characters."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:REASON])


def refuse_unserved(recipe: Any) -> None:
    """Raises FedError where a recipe asks for what a federation across machines does not do."""
    run, asked = recipe.run, recipe.eval
    faults = any(recipe.faults.shares.values())
    for holds, key, why in (
        (asked.alone is not None, "eval.alone", "the server has nobody's rows to train on"),
        (asked.clients, "eval.clients=true", "a client's own model stays with its node"),
        (recipe.hub.clients, "hub.clients=true", "clients' own adapters are not collected from their nodes"),
        (bool(recipe.model.own), "model.own", "a node's model is what its policy lists"),
        (faults, "faults", "faults on purpose are for simulations"),
        (run.parallel != "clients", f"run.parallel={run.parallel}", "each node trains its client alone"),
        (run.on_client_error == "stop", "run.on_client_error=stop", "a traceback stays on its node"),
    ):
        if holds:
            raise FedError(f"{key} does not go with fedllm serve: {why}.")


def sorted_ids(ids: Sequence[str]) -> list[str]:
    """Ids in the order that own data has them: numbers as numbers, the rest as text."""
    return sorted(ids, key=lambda id: (0, int(id), "") if id.isdigit() else (1, 0, id))
