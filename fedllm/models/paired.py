"""Networks that are trained side by side: one is a client's own, the other travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.structure import FedModel


class Beside(FedModel):
    """Named networks in one module; which sees what is for the rule to say (``forward`` of the worker's ``train``)."""

    def __init__(self, **parts: FedModel) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def joined(**parts: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of the parts under the names that they have in ``Beside``: ``part.name``."""
    return {f"{part}.{name}": W for part, weights in parts.items() for name, W in weights.items()}


def part_of(part: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """One part's weights under its own names again."""
    start = f"{part}."
    return {name.removeprefix(start): W for name, W in weights.items() if name.startswith(start)}
