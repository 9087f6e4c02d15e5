"""pFedLoRA (Park and Klabjan, 2024): full shared weights, and a private low-rank pair beside every convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.algorithms.personal import personal_step
from fedllm.config.types import Count, NonNegative, Share
from fedllm.core import ClientWorker, LocalResult, Phase, Reply, Round, Tensors
from fedllm.models.lowrank_conv import adaptable, kaiming, merge

PAIR = "private"


@dataclass(frozen=True)
class PFedLoRA2(FedAvg):
    """W is shared and averaged, L and U are the client's own, and all train together to ``W + alpha/r U L``.

    Args:
        rank: r of the private pairs, as far as a convolution has it.
        alpha: LoRA's.
    """

    rank: Count = 32
    alpha: NonNegative = 16.0

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        private = memory or self.pairs(worker, rnd)
        return personal_step(worker, sent, private, rnd, {PAIR: self.alpha}, phases=self.turns(private))

    def turns(self, private: Tensors) -> Sequence[Phase]:
        return ((1.0, lambda name: True),)

    def pairs(self, worker: ClientWorker, rnd: Round) -> dict[str, torch.Tensor]:
        """L drawn, U zero."""
        model, drawn = worker.model, {}
        for layer in adaptable(model.make(), model.anatomy):
            W = model.weights[f"{layer}.weight"]
            m, n = W.shape[0], W[0].numel()
            r = min(self.rank, m, n)
            drawn[f"{layer}.{PAIR}.up.weight"] = torch.zeros(m, r)
            drawn[f"{layer}.{PAIR}.down.weight"] = kaiming((r, n), rnd.rng("pairs", worker.client.id, layer))
        return drawn

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        """The pairs added to the weights that they stand beside."""
        whole = merge({**memory, **reply.returned}, PAIR, self.alpha)
        return {name: tensor for name, tensor in whole.items() if name not in memory}


@dataclass(frozen=True)
class PFedLoRA1(PFedLoRA2):
    """First L and U for ``private_share`` of the round's steps, W frozen; then W.

    Args:
        private_share: two of five epochs by default.
    """

    private_share: Share = 0.4

    def turns(self, private: Tensors) -> Sequence[Phase]:
        return (
            (self.private_share, lambda name: name in private),
            (1 - self.private_share, lambda name: name not in private),
        )
