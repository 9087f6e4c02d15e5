"""RoLoRA (Chen, Guo, Ju, Dalal, Zhu, Khisti, NeurIPS 2025): odd rounds train and average B, even rounds A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedllm.algorithms.lora.ffa_lora import FFALoRA
from fedllm.core import Client, Round, Tensors


@dataclass(frozen=True)
class RoLoRA(FFALoRA):
    """``B = sum p_i B_i`` while A is frozen, then ``A = sum p_i A_i`` while B is: every round is exact.

    B comes first, since A has no gradient while B is zero. Each factor's moments wait for its own rounds.
    """

    plain_mean: ClassVar[bool] = True

    def factor(self, sent: Tensors) -> Literal["B", "A"]:
        return "B" if int(sent["round"]) % 2 else "A"

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return {**super().download(state, client, rnd), "round": torch.tensor(rnd.index)}
