"""raFLoRA (Wu, Hu, Min, Wang, 2026): FlexLoRA whose directions are each averaged over the clients that have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedllm.algorithms.lora.flexlora import FlexLoRA
from fedllm.lowrank import LowRank
from fedllm.mean import mean_directions


@dataclass(frozen=True)
class RaFLoRA(FlexLoRA):
    """``W = sum_j sum_(r_i >= j) (n_i / N_j) b_ij a_ij`` with ``N_j = sum_(r_i >= j) n_i``.

    Client i is sent ``W^(r_i)``, whose direction j is column j of its B and row j of its A. RB-LoRA (Ha et al., EACL
    Findings 2026) has the same weights. Where nobody of the cohort holds direction j, that of ``W^(r_max)`` stays.
    """

    differs: ClassVar[str] = "all of W is served, not its best approximation"

    any_rank: ClassVar[bool] = False  # a column's place says who shares it

    def averaged(self, updates: Sequence[LowRank], weights: Sequence[float], top: LowRank) -> LowRank:
        mean, r = mean_directions(updates, weights), max(update.rank for update in updates)
        return mean + LowRank(top.B[:, r:], top.A[r:])
