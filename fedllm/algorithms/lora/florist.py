"""FLoRIST (Ramesh, Dass, MLSys 2026): FLoRA whose stack is cut to the directions that hold most of its energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.algorithms.lora.flora import FLoRA
from fedllm.config.types import SomeShare
from fedllm.lowrank import LowRank, dominant


@dataclass(frozen=True)
class FLoRIST(FLoRA):
    """``W <- W + S_k`` with ``S = sum p_i B_i A_i`` and its k leading singular directions.

    Args:
        threshold: k is the fewest directions of a module that hold this share of the sum of squared singular values;
            1 is FLoRA.
    """

    threshold: SomeShare = 0.9

    def increment(self, updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        return dominant(super().increment(updates, weights).balanced(), self.threshold)
