"""HetLoRA (Cho, Liu, Xu, Fahrezi, Joshi, EMNLP 2024): zero-padding by norms, and clients that prune their own rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedllm.algorithms.lora.zero_padding import ZeroPadding
from fedllm.config.types import NonNegative, SomeShare
from fedllm.core import Client, ClientWorker, LocalResult, Reply, Round, Tensors
from fedllm.lowrank import LowRank


@dataclass(frozen=True)
class HetLoRA(ZeroPadding):
    """A client's tail, ``sum |B[:, c:]|_F |A[c:]|_F`` over its modules with ``c = floor(gamma r_i)``, may be pruned.

    The loss gains ``tail`` times the regularization. A client whose tail is smaller after training than it was as
    received returns zeros there, and its rank is c from then on, at least 1. The server pads and weighs by
    ``|M_i|_F``. State: B and A by module, and ``rank/client`` of those who have pruned.

    Args:
        gamma: the share of a rank that is no tail; 1 never prunes. Not the paper's value, which we have not read.
        regularization: lambda of the tail's term. Likewise.
    """

    differs: ClassVar[str] = "gamma and lambda, which are not the paper's"

    weights: Literal["fedavg", "norm"] = "norm"
    gamma: SomeShare = 0.99
    regularization: NonNegative = 0.01

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return super().download(_modules(state), self._pruned(state, client), rnd)

    def _pruned(self, state: Tensors, client: Client) -> Client:
        return replace(client, rank=int(state.get(f"rank/{client.id}", client.rank)))

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        ranks = {name: int(self.gamma * M.rank) or 1 for name, M in sent.items()}
        penalty = None
        if self.regularization and any(c < sent[name].rank for name, c in ranks.items()):

            def penalty(trained: Tensors) -> Tensor:
                return self.regularization * _tail(trained, ranks)

        returned, kept, metrics = worker.train(sent, memory, rnd, product_penalty=penalty)
        if bool(_tail(returned, ranks) < _tail(sent, ranks)):
            returned = {name: _cut(M, ranks[name]) for name, M in returned.items()}
            kept = {}  # moments are of the rank that it had
        return LocalResult(returned, kept, metrics)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        after = dict(super().aggregate(_modules(state), replies, rnd))
        after |= {name: value for name, value in state.items() if name.startswith("rank/")}
        for reply in replies:
            held = max(int((M.A != 0).any(dim=1).sum()) for M in reply.returned.values())
            if held < max(M.rank for M in reply.returned.values()):
                after[f"rank/{reply.client.id}"] = torch.tensor(max(1, held))
        return after

    def served(self, state: Tensors) -> Tensors:
        return _modules(state)

    def truncated(self, state: Tensors, client: Client) -> float:
        return super().truncated(_modules(state), self._pruned(state, client))


def _modules(state: Tensors) -> dict[str, LowRank]:
    return {name: M for name, M in state.items() if isinstance(M, LowRank)}


def _tail(products: Tensors, ranks: dict[str, int]) -> Tensor:
    norm = torch.linalg.matrix_norm
    parts = [norm(M.B[:, ranks[name] :]) * norm(M.A[ranks[name] :]) for name, M in products.items()]
    return torch.stack(parts).sum()


def _cut(M: LowRank, c: int) -> LowRank:
    """The first c columns and rows, zeros in place of the others."""
    kept = torch.arange(M.rank) < c
    return LowRank(M.B * kept, M.A * kept[:, None])
