"""What cannot be had together with a guarantee, and why, before anything is loaded."""

from __future__ import annotations

from fedllm.algorithms import ALGORITHMS
from fedllm.errors import FedError
from fedllm.recipe.sections import Recipe
from fedllm.workers.settings import SFT


def check_privacy(recipe: Recipe) -> None:
    """Raises FedError where a recipe's guarantee would not hold."""
    checks = {"none": (), "client": _client(recipe), "example": _example(recipe)}[recipe.privacy.unit]
    for holds, message in checks:
        if not holds:
            raise FedError(f"privacy.unit={recipe.privacy.unit}: {message}")


def _client(recipe: Recipe) -> tuple[tuple[bool, str], ...]:
    rule, run = recipe.algorithm_name, recipe.run
    fit = ", ".join(name for name, kind in ALGORITHMS.items() if kind.summed)
    everybody = "moves all: the cohort decides about everybody, so no bound on one client's influence is known"
    shown = "what a client holds itself has no noise on it"
    return (
        (
            isinstance(recipe.worker, SFT),
            f"worker.name={recipe.worker_name} cannot train B alone: take worker.name=sft.",
        ),
        (
            recipe.algorithm.summed,
            f"algorithm.name={rule} does more with a reply than add it up, so no bound on one client's influence is "
            f"known. Take one of {fit}, or privacy.unit=example.",
        ),
        (
            recipe.robust_name == "none",
            f"robust.name={recipe.robust_name} {everybody}. The clip bounds each client alone: robust.name=none.",
        ),
        (
            recipe.admission.norm_bound is None,
            f"admission.norm_bound={recipe.admission.norm_bound} {everybody}. The clip does its work: leave it null.",
        ),
        (
            run.quorum == 0 and run.attempts == 1,
            f"run.quorum={run.quorum:g}, run.attempts={run.attempts}: a round that is repeated tells who was missing. "
            "Leave both away; a client that is missing adds nothing.",
        ),
        (
            "int8" not in (recipe.wire.up, recipe.wire.down),
            f"wire.up={recipe.wire.up}, wire.down={recipe.wire.down}: 8 bits move A, and what rounding owes is carried "
            "on beyond the clip. float16 and float32 are fine.",
        ),
        (not recipe.eval.clients, f"eval.clients=true scores clients' own models, and {shown}."),
        (recipe.eval.alone is None, f"eval.alone trains a client by itself, and {shown}."),
        (not recipe.hub.clients, f"hub.clients=true keeps clients' own adapters, and {shown}."),
        (not recipe.model.own, "model.own leaves every client its own model; nothing is summed."),
    )


def _example(recipe: Recipe) -> tuple[tuple[bool, str], ...]:
    worker, rule = recipe.worker, recipe.algorithm_name
    if not isinstance(worker, SFT):
        return ((False, f"worker.name={recipe.worker_name} has no noisy optimizer: take worker.name=sft."),)
    return (
        (
            not recipe.algorithm.any_model,
            f"algorithm.name={rule} has clients answer from their rows beside training, and that has no noise on it: "
            "take a rule that averages adapters.",
        ),
        (
            worker.steps is not None,
            "worker.epochs makes the number of steps tell how many rows a client has: give worker.steps.",
        ),
        (
            worker.accumulation == 1,
            f"worker.accumulation={worker.accumulation}: a step draws its rows at once; a larger worker.batch_size "
            "is the same.",
        ),
        (
            not worker.gradient_checkpointing,
            "worker.gradient_checkpointing=true recomputes what each row's gradient is taken from: set it to false.",
        ),
        (
            recipe.model.quantization == "none",
            f"model.quantization={recipe.model.quantization} is untested with gradients of single rows: take none.",
        ),
        (recipe.run.parallel == "clients", f"run.parallel={recipe.run.parallel} splits a step's rows: take clients."),
        (recipe.eval.alone is None, "eval.alone trains a client's rows once more, which nobody counts."),
        (recipe.privacy.cohort == "public", "privacy.cohort=secret hides clients, not rows: leave it public."),
    )
