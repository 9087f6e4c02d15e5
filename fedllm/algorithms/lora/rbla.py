"""RBLA (Chen, Tavallaie, Nazemi, Zomaya, ICWS 2024): a column of B, row of A is averaged over those that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedllm.algorithms.lora.zero_padding import LeadingColumns
from fedllm.core import Reply, Round, Tensors
from fedllm.mean import mean_columns, pad


@dataclass(frozen=True)
class RBLA(LeadingColumns):
    """``b_j = sum_(r_i >= j) (n_i / N_j) b_ij`` with ``N_j = sum_(r_i >= j) n_i``, and ``a_j`` likewise.

    Where nobody of the cohort holds column j, it stays as it was.
    """

    differs: ClassVar[str] = "a column that nobody of the cohort holds stays as it was"

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        after = {}
        for name, W in state.items():
            updates = [reply.returned[name] for reply in replies]
            largest = max(W.rank, *(update.rank for update in updates))
            places = [torch.arange(update.rank) for update in updates]
            after[name] = mean_columns(pad(W, largest), updates, places, weights)
        return after
