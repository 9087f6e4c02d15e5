"""The federation that a recipe describes, by the kind of its worker."""

from __future__ import annotations

from collections.abc import Callable

from fedllm.federation.arrays import ArrayFederation
from fedllm.federation.text import TextFederation
from fedllm.recipe.sections import Recipe

FEDERATIONS: dict[str, Callable[[Recipe], TextFederation | ArrayFederation]] = {
    "sft": TextFederation,
    "vision": ArrayFederation,
}
"""Each ``worker.name`` with the federation that its clients make up."""


def build_federation(recipe: Recipe) -> TextFederation | ArrayFederation:
    """Reads and deals out the rows of a recipe; loads no weight.

    Raises:
        FedError: rows that cannot be had, clients without rows, ranks or levels that do not fit the model.
    """
    return FEDERATIONS[recipe.worker_name](recipe)
