"""The settings of local training: the section `worker` of a recipe."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fedllm.config.types import Count, NonNegative, PartShare, Positive, Share, needs
from fedllm.errors import FedError
from fedllm.models.language import LanguageModel
from fedllm.models.network import Network
from fedllm.tasks.arrays import Arrays
from fedllm.tasks.task import Task

ALPHA = "a number above 0, or a multiple of the rank such as 2r"
"""What ``worker.alpha`` is."""


@dataclass(frozen=True)
class SFT:
    """How a client trains.

    Args:
        targets: names of the linear modules that get an adapter, matched as PEFT matches them.
        alpha: LoRA's alpha: a number, or ``2r`` for twice the client's rank. The update is scaled by alpha / r.
        rslora: scale by alpha / sqrt(r) instead.
        dropout: on the adapter's input.
        epochs: passes over the client's rows in a round, ``K``.
        steps: optimizer steps in a round instead of ``epochs``.
        batch_size: rows a forward pass.
        accumulation: forward passes an optimizer step.
        learning_rate: AdamW's, constant inside a round.
        schedule: of the learning rate across rounds; ``cosine`` and ``linear`` end at 0 after the last.
        weight_decay: AdamW's.
        max_grad_norm: the gradient is clipped to this norm; 0 for never.
        optimizer: ``fresh`` in every round, or ``kept``: each client's moments wait for its next round.
        max_length: tokens a row is cut to.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
    """

    targets: tuple[str, ...] = ("q_proj", "v_proj")
    alpha: Annotated[Positive | str, needs(ALPHA)] = "2r"
    rslora: bool = False
    dropout: PartShare = 0.0
    epochs: Positive = 1.0
    steps: Count | None = None
    batch_size: Count = 1
    accumulation: Count = 1
    learning_rate: NonNegative = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    optimizer: Literal["fresh", "kept"] = "fresh"
    max_length: Count = 512
    gradient_checkpointing: bool = False

    model_section: ClassVar[type] = LanguageModel
    task_kind: ClassVar[type] = Task
    exported: ClassVar[str] = "adapter"
    whole: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str) and not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?r?", self.alpha):
            raise FedError(f"worker.alpha={self.alpha!r}: give {ALPHA}.")

    def alpha_of(self, rank: int) -> float:
        """LoRA's alpha for a client of this rank."""
        text = str(self.alpha)
        return float(text[:-1]) * rank if text.endswith("r") else float(text)

    def scale(self, rank: int) -> float:
        """``s_i``: what ``B A`` is multiplied by. alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rslora else rank)

    def steps_for(self, rows: int) -> int:
        """Optimizer steps in a round for a client with this many rows."""
        return math.ceil(self.epochs * self.steps_in_epoch(rows)) if self.steps is None else self.steps

    def steps_in_epoch(self, rows: int) -> int:
        """Optimizer steps that see each of this many rows once; the last may be of fewer than the others."""
        return math.ceil(math.ceil(rows / self.batch_size) / self.accumulation)

    def shared(self, processes: int) -> tuple[int, int]:
        """Rows a forward pass and passes a step of each of so many processes that train one client together.

        A step's rows stay as many: each process takes its part of the passes, or else of every pass.

        Raises:
            FedError: where neither can be divided.
        """
        if self.accumulation % processes == 0:
            return self.batch_size, self.accumulation // processes
        if self.batch_size % processes == 0:
            return self.batch_size // processes, self.accumulation
        raise FedError(
            f"{processes} processes cannot share the rows of a step, worker.batch_size={self.batch_size} x "
            f"worker.accumulation={self.accumulation}: make one of the two a multiple of {processes}."
        )

    def learning_rate_in(self, index: int, rounds: int) -> float:
        """The learning rate of round ``index`` (from 1) of ``rounds``."""
        done = (index - 1) / max(rounds, 1)
        shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * shape[self.schedule]


@dataclass(frozen=True)
class Vision:
    """How a client trains. The optimizer is new in every round, its momentum is never kept or sent.

    Args:
        epochs: passes over the client's examples in a round.
        batch_size: examples a step; a last batch of one is dropped, batch norm cannot use it.
        learning_rate: SGD's, constant inside a round.
        final_learning_rate: what a schedule ends at.
        schedule: of the learning rate across rounds.
        momentum: SGD's.
        weight_decay: SGD's, on every weight that trains.
        max_grad_norm: the gradient is clipped to this norm; 0 for never.
        test_batch_size: examples at once in a test; with norms on batch statistics the scores depend on it.
        statistics: of the norms at a test: the ``batch``'s own, or ``static`` ones gathered before from training
            batches with the weights to be tested (HeteroFL's sBN).
        score: test accuracy over ``pooled`` examples, the mean over the ``clients``' own test examples, or ``both``.
        alpha: LoRA's, of rules on low-rank updates of convolutions: an update is scaled by alpha / r.
        dropout: between the factors of an update, in training.
    """

    epochs: Positive = 1.0
    batch_size: Count = 64
    learning_rate: NonNegative = 0.1
    final_learning_rate: NonNegative = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    momentum: Share = 0.9
    weight_decay: NonNegative = 5e-4
    max_grad_norm: NonNegative = 0.0
    test_batch_size: Count = 100
    statistics: Literal["batch", "static"] = "batch"
    score: Literal["pooled", "clients", "both"] = "pooled"
    alpha: Positive = 16.0
    dropout: PartShare = 0.0

    model_section: ClassVar[type] = Network
    task_kind: ClassVar[type] = Arrays
    exported: ClassVar[str] = "model"
    whole: ClassVar[bool] = True

    def steps_for(self, rows: int) -> int:
        """Optimizer steps in a round for a client with this many examples."""
        whole, rest = divmod(rows, self.batch_size)
        return max(1, math.ceil(self.epochs * (whole + (rest > 1))))

    def learning_rate_in(self, index: int, rounds: int) -> float:
        """The learning rate of round ``index`` (from 1) of ``rounds``: ``m + (lr - m)(1 + cos(pi t / T)) / 2``."""
        done = (index - 1) / max(rounds, 1)
        shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2}[self.schedule]
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * shape
