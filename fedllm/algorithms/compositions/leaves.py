"""Tensors as plain entries: what steps entry by entry looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedllm.core import Tensors
from fedllm.lowrank import LowRank


def leaves(values: Tensors) -> dict[str, Tensor]:
    """The factors of a product as ``B/name`` and ``A/name``, which is what rules that send one of them call it too."""
    flat: dict[str, Tensor] = {}
    for name, value in values.items():
        flat |= {f"B/{name}": value.B, f"A/{name}": value.A} if isinstance(value, LowRank) else {name: value}
    return flat


def joined(like: Tensors, flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse, with the names and kinds of ``like``; a leaf that ``flat`` lacks is zero."""

    def leaf(name: str, value: Tensor) -> Tensor:
        return flat[name] if name in flat else value.new_zeros(value.shape)

    return {
        name: LowRank(leaf(f"B/{name}", M.B), leaf(f"A/{name}", M.A)) if isinstance(M, LowRank) else leaf(name, M)
        for name, M in like.items()
    }


def is_statistic(name: str, x: Tensor) -> bool:
    """Whether this is a counter, or a mean or variance of batch normalisation, which no step may make negative."""
    return not x.is_floating_point() or name.endswith(("running_mean", "running_var"))
