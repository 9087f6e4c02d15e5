"""``privacy.jsonl``: every release of a run, written and on disk before anybody can see what was released.

A crash between the line and the release counts it all the same, and a round that is played again counts twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import FedError
from fedllm.privacy.accountant import Release
from fedllm.storage import files

NAME = "privacy.jsonl"
LARGEST = 1 << 30


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line, on disk when it returns. What a crash left of a line is removed: nothing was released by it."""
    if path.exists():
        there = files.read_bytes(path, LARGEST)
        if there and not there.endswith(b"\n"):
            files.write(path, there[: there.rfind(b"\n") + 1])
    files.append(path, json.dumps(dict(line)) + "\n")
    files.sync(path.parent)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines, of which only the last may be torn: its release was not made.

    Raises:
        FedError: where another line is none; what was spent is then not known.
    """
    if not path.exists():
        return []
    *whole, _ = files.read_bytes(path, LARGEST).split(b"\n")
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise FedError(
                f"{path}, line {number}, cannot be read, so nobody knows how much of the privacy budget is spent: "
                "start anew with run.overwrite=true."
            ) from error
    return lines


def by_member(lines: list[dict[str, Any]]) -> dict[str, list[Release]]:
    """The releases that each client took part in; of secret cohorts those of everybody, under ``*``."""
    found: dict[str, list[Release]] = {}
    for line in lines:
        for id, (q, count) in line["members"].items():
            found.setdefault(id, []).append(Release(float(line["noise_multiplier"]), float(q), int(count)))
    return found
