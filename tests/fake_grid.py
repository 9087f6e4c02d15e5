"""Flower's grid without its programs: messages go to nodes in this process, through the same records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm.fleets.flower import api
from fedllm.fleets.flower.node import Node

Answered = tuple[dict[str, Any], bytes]


@dataclass
class FakeGrid:
    """Nodes by number.

    Args:
        there: each node by its number; what it answers may be spoilt on its way by ``spoil(number, note, answer)``.
        bodies: all that travelled, both ways.
    """

    there: dict[int, Node]
    spoil: Callable[[int, Mapping[str, Any], Answered], Answered | api.Answer | None] = lambda n, note, done: done
    keys: Mapping[int, bytes] = field(default_factory=dict)
    activated: dict[int, float] = field(default_factory=dict)
    waiting: dict[str, api.Answer] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    pushed: list[dict[str, Any]] = field(default_factory=list)
    lost: bool = False

    def nodes(self) -> dict[int, api.Node]:
        return {
            n: api.Node(n, node.policy.client, self.keys.get(n, b""), True, self.activated.get(n, 1.0))
            for n, node in self.there.items()
        }

    def push(self, node: int, note: Mapping[str, Any], payload: bytes = b"", group: str = "") -> str:
        asked, body = api.read(api.record(note, payload), 1 << 30)
        self.pushed.append({"node": node, **asked})
        self.bodies.append(body)
        done = self.spoil(node, asked, self.there[node].handle(asked, body))
        id = f"m{len(self.pushed)}"
        if done is None:
            return id
        if isinstance(done, tuple):
            self.bodies.append(done[1])
            done = api.Answer(api.record(*done))
        self.waiting[id] = done
        return id

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, api.Answer]]:
        for id in ids:
            if id in self.waiting:
                yield id, self.waiting.pop(id)
        time.sleep(0.001)
