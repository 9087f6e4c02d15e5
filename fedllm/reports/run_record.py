"""What a run's folder holds, read for a person: recipe, rounds, summary, partition.

The files may be another's, or of a run that is still going or was cut off: what is missing reads as empty, what cannot
be read is counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from fedllm.config import plain_yaml
from fedllm.errors import FedError
from fedllm.reports.formatting import is_fraction, number
from fedllm.storage import files

LARGEST_DIARY, LONGEST_RECORD, LARGEST_NOTE = 1 << 30, 8 << 20, 64 << 20
"""Bytes of ``rounds.jsonl``, of one of its lines, and of a JSON file beside it that are read."""

LAST = 10**9
"""No run has so many rounds; a record that claims to be later is broken."""

Points = list[tuple[int, float]]
"""A curve: rounds and values."""


@dataclass(frozen=True)
class Member:
    """A client as the partition and the rounds know it."""

    id: str
    rank: int = 0
    rows: int = 0
    labels: Mapping[str, float] = field(default_factory=dict, hash=False)
    level: str = ""

    @property
    def kind(self) -> str:
        """What it shares with clients of its capacity: a level, a network of their own, or a rank; else empty."""
        return self.level or f"rank {self.rank}" * bool(self.rank)


@dataclass(frozen=True)
class Story:
    """What a run's folder holds. Rounds are in order, one record each; every other part may be empty.

    Args:
        unreadable: lines of ``rounds.jsonl`` that are not a round's record; a run that was cut off leaves one.
    """

    name: str
    rounds: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    partition: Mapping[str, Any]
    recipe: Mapping[str, Any]
    members: tuple[Member, ...]
    unreadable: int

    def curve(self, *path: str) -> Points:
        """The numbers at this place of the records, by round."""
        found = ((rnd["round"], number(at(rnd, *path))) for rnd in self.rounds)
        return [(index, value) for index, value in found if value is not None]

    def keys(self, part: str) -> list[str]:
        """The numeric keys under a part of the records, in order of appearance."""
        found = (
            key for rnd in self.rounds for key, value in mapping(rnd.get(part)).items() if number(value) is not None
        )
        return list(dict.fromkeys(found))

    def by_kind(self) -> dict[str, list[Member]]:
        return {kind: list(group) for kind, group in groupby(self.members, key=lambda member: member.kind)}

    @property
    def took_part(self) -> int:
        """How many clients trained in any of the rounds."""
        return len({id for rnd in self.rounds for id in mapping(rnd.get("clients")) or mapping(rnd.get("weights"))})

    @property
    def sorted_by(self) -> str:
        """How a title says what tells the clients apart."""
        if any(member.level for member in self.members):
            return ", by level"
        return ", by rank" * any(member.rank for member in self.members)


def read(run: Path) -> Story:
    """The story in a folder. Raises FedError where no round was recorded."""
    if not (run / "rounds.jsonl").is_file():
        raise FedError(f"{run} is no run's folder: it has no rounds.jsonl. Give the folder that run.output named.")
    records, unreadable = records_in(run / "rounds.jsonl")
    if not records:
        raise FedError(f"{run / 'rounds.jsonl'} has no finished round yet. Let the run finish one, then ask again.")
    partition = json_in(run / "partition.json")
    return Story(
        name=run.resolve().name,
        rounds=tuple(records),
        summary=json_in(run / "summary.json"),
        partition=partition,
        recipe=yaml_in(run / "recipe.yaml"),
        members=tuple(members_of(partition, records)),
        unreadable=unreadable,
    )


def records_in(path: Path) -> tuple[list[Mapping[str, Any]], int]:
    """The rounds in order, the last record of each, and how many lines were none."""
    found: dict[int, Mapping[str, Any]] = {}
    unreadable = 0
    for line in files.read_bytes(path, LARGEST_DIARY).split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line if len(line) <= LONGEST_RECORD else b"")
            index = int(record["round"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            index = 0
        if 0 < index < LAST:
            found[index] = record
        else:
            unreadable += 1
    return [{**found[index], "round": index} for index in sorted(found)], unreadable


def json_in(path: Path) -> Mapping[str, Any]:
    try:
        return mapping(json.loads(files.read_bytes(path, LARGEST_NOTE)))
    except (FedError, ValueError, RecursionError):
        return {}


def yaml_in(path: Path) -> Mapping[str, Any]:
    try:
        return mapping(plain_yaml.read(path))
    except FedError:
        return {}


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def at(record: Mapping[str, Any], *path: str) -> Any:
    value: Any = record
    for key in path:
        value = mapping(value).get(key)
    return value


def members_of(partition: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[Member]:
    """Every client of the partition and of any round, by rank, by level and then by name, c2 before c10."""
    known: dict[str, dict[str, Any]] = {}
    for record in records:
        for key in ("weights", "truncation_error", "refused", "clients"):
            for id, entry in mapping(record.get(key)).items():
                known.setdefault(id, {}).update(mapping(entry))
    for id, entry in mapping(partition.get("clients")).items():
        known.setdefault(id, {}).update(mapping(entry))
    members = [
        Member(
            id,
            rank=int(number(entry.get("rank")) or 0),
            rows=int(number(entry.get("rows")) or 0),
            labels={label: n for label, n in map_numbers(entry.get("labels")) if n > 0},
            level=str(entry.get("level") or ""),
        )
        for id, entry in known.items()
    ]
    return sorted(members, key=lambda member: (member.rank, natural(member.level), natural(member.id)))


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers inside names by value."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def map_numbers(value: Any) -> Iterator[tuple[str, float]]:
    for key, inner in mapping(value).items():
        known = number(inner)
        if known is not None:
            yield key, known


def leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers in a nested mapping with their paths."""
    for key, inner in mapping(value).items():
        known = number(inner)
        if known is not None:
            yield (*path, key), known
        yield from leaves((*path, key), inner)


def rows_of(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = summary.get("rows")
    return [row for row in map(mapping, rows) if row] if isinstance(rows, list) else []


def base_row(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first model of the summary, where it is what the run began from; else nothing."""
    first = next(iter(rows_of(summary)), {})
    trained = any(word in str(first.get("name", "")).lower() for word in ("federated", "client", "alone"))
    return {} if trained else first


def client_scores(story: Story, kind: str, key: str) -> dict[Member, float]:
    """The score of every client ``alone``, or of its ``own`` model after the last round that it was in.

    From the summary, where models were scored on the run's test rows; what clients score themselves is in the rounds.
    """
    members = {member.id: member for member in story.members}
    found: dict[Member, float] = {}
    if kind == "own" and key.startswith("own_"):
        courses = {member: story.curve("clients", id, key) for id, member in members.items()}
        found = {member: course[-1][1] for member, course in courses.items() if course}
    for row in rows_of(story.summary):
        words = str(row.get("name", "")).replace(",", " ").split()
        value = number(row.get(key))
        if len(words) > 2 and words[0] == "client" and kind in words and words[1] in members and value is not None:
            found[members[words[1]]] = value
    return {member: found[member] for member in story.members if member in found}


def own_keys(story: Story) -> list[str]:
    """The shares of 1 that at least two clients' own models have."""
    keys = [*story.keys("eval"), *(key for row in rows_of(story.summary) for key, _ in map_numbers(row))]
    return [k for k in dict.fromkeys(keys) if is_fraction(k) and len(client_scores(story, "own", k)) > 1]


def lower_is_better(key: str) -> bool:
    return "loss" in key.lower() or "perplexity" in key.lower()


def course_of(keys: Iterable[str]) -> str | None:
    """The score to follow by round and by bytes: the loss, or else the first of which less is better."""
    falling = [key for key in keys if lower_is_better(key)]
    return next((key for key in falling if "loss" in key.lower()), next(iter(falling), None))


def clipped(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"
