"""Checks across the sections of a recipe, before anything is loaded."""

from __future__ import annotations

from fedllm.algorithms import ALGORITHMS
from fedllm.core import Algorithm
from fedllm.errors import FedError
from fedllm.recipe.sections import Recipe
from fedllm.tasks import TASKS
from fedllm.workers import WORKERS


def check_compatible(recipe: Recipe) -> None:
    """A rule on networks, the worker that trains them and the data it takes; or adapters and text."""
    if not isinstance(recipe.data.task, recipe.worker.task_kind):
        fit = [name for name, kind in TASKS.items() if issubclass(kind, recipe.worker.task_kind)]
        raise FedError(
            f"data.name={recipe.data_name} is nothing that worker.name={recipe.worker_name} trains on: "
            f"take another worker ({', '.join(WORKERS)}), or one of {', '.join(fit)}."
        )
    fit = [name for name, rule in ALGORITHMS.items() if trains(recipe.worker.whole, rule)]
    if not trains(recipe.worker.whole, recipe.algorithm):
        kind = "networks" if recipe.worker.whole else "low-rank updates of language models"
        raise FedError(
            f"algorithm.name={recipe.algorithm_name} does not train what worker.name={recipe.worker_name} trains "
            f"({kind}): take one of {', '.join(fit)}."
        )


def trains(whole: bool, rule: Algorithm | type[Algorithm]) -> bool:
    """Whether a rule can be had of a worker that trains networks (``whole``), or of one that trains adapters."""
    return rule.any_model or (bool(rule.network) if whole else rule.low_rank or not rule.network)


def check_values(recipe: Recipe) -> None:
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
    if not recipe.data.partition.names_clients:
        check_alone(recipe, len(recipe.clients.ranks()))
    for holds, message in checks:
        if not holds:
            raise FedError(message)


def check_alone(recipe: Recipe, clients: int) -> None:
    """Raises FedError where ``eval.alone`` names a client that is not there."""
    if not all(0 <= place < clients for place in recipe.eval.alone_of(clients)):
        raise FedError(f"eval.alone={recipe.eval.alone}: the clients are 0 to {clients - 1}.")
