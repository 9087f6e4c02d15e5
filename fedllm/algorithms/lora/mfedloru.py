"""mFedLoRU: FedLoRU for clients of different rank, who train factors of the factors (FedLoRU paper, Algorithm 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.algorithms.lora.fedloru import FedLoRU, arrived
from fedllm.config.types import Count, NonNegative
from fedllm.core import Client, ClientWorker, LocalResult, Reply, Round, Tensors, under
from fedllm.errors import FedError
from fedllm.lowrank import LowRank


@dataclass(frozen=True)
class MFedLoRU(FedLoRU):
    """Client i trains the nested factors in ``(B + a B_d B_u)(A + a A_d A_u)`` (eq. 15).

    Their shapes: ``B_d (d, r_i), B_u (r_i, r), A_d (r, r_i), A_u (r_i, k)``. B and A, of rank r, are sent and stay as
    they are; ``B_d`` and ``A_d`` are drawn anew every round and ``B_u = A_u = 0``, so both products start at zero. The
    four are returned, LoRA's scale folded into ``B_d``; the server rebuilds ``B_i = B + B_d B_u`` and
    ``A_i = A + A_d A_u`` and averages those (eq. 37). A client with ``r_i = r`` trains B and A themselves, and a factor
    that is smaller than its two factors is returned rebuilt. ``a`` is in ``B_d`` and ``A_d`` from their start on.

    Args:
        rank: r; the largest client's by default.
        a: the paper's alpha_A = alpha_B, not stated.
    """

    rank: Count | None = None
    a: NonNegative = 1.0

    def validate(self, clients: Sequence[Client]) -> None:
        largest = max(client.rank for client in clients)
        if self.rank is not None and self.rank < largest:
            raise FedError(f"rank={self.rank} is below a client's, {largest}: raise it, or lower clients.rank.")

    def adapter_rank(self, clients: Sequence[Client]) -> int:
        return self.rank or super().adapter_rank(clients)

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return {**super().download(state, client, rnd), "rank": torch.tensor(min(client.rank, int(state["r"])))}

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        adapters, r_i = arrived(sent), int(sent["rank"])
        if all(update.rank == r_i for update in products(adapters).values()):
            done = super().local(worker, sent, memory, rnd)
            return done._replace(returned=_factors(done.returned))
        W = self.remembered(sent, memory, rnd)
        starts = {
            name: LowRank(self.a * _uniform(factor.shape[0], r_i, rnd.rng("nested", name)), zeros(r_i, factor.shape[1]))
            for name, factor in _factors(products(adapters)).items()
        }
        trained, _, metrics = worker.train(adapters, {}, rnd, frozen=W, nested=starts)
        returned = {
            name: trained[name] if name not in starts or _is_lean(factor, r_i) else factor + trained[name].dense()
            for name, factor in _factors(adapters).items()
        }
        return LocalResult(returned, self.memory(W, rnd), metrics)

    def expected(self, reply: Reply) -> Tensors:
        adapters, r_i = arrived(reply.sent), int(reply.sent["rank"])
        lean = {
            name: LowRank(zeros(factor.shape[0], r_i), zeros(r_i, factor.shape[1]))
            for name, factor in _factors(products(adapters)).items()
            if _is_lean(factor, r_i)
        }
        return _factors(adapters) | lean

    def trained(self, reply: Reply) -> Tensors:
        adapters = arrived(reply.sent)
        whole = {name: _rebuilt(factor, reply.returned[name]) for name, factor in _factors(adapters).items()}
        rebuilt = {name: LowRank(whole[f"B/{name}"], whole[f"A/{name}"]) for name in products(adapters)}
        return {name: rebuilt[name] if name in rebuilt else whole[name] for name in adapters}


def products(adapters: Tensors) -> dict[str, LowRank]:
    """Those that are products; what else a network trains has no factors."""
    return {name: M for name, M in adapters.items() if isinstance(M, LowRank)}


def _factors(adapters: Tensors) -> dict[str, Any]:
    """``B/name`` and ``A/name`` of every product, and the rest as it is."""
    pairs = products(adapters)
    rest = {name: value for name, value in adapters.items() if name not in pairs}
    return under("B", {n: M.B for n, M in pairs.items()}) | under("A", {n: M.A for n, M in pairs.items()}) | rest


def _rebuilt(factor: Tensor, returned: Tensor | LowRank) -> Tensor:
    """The factor with what its two factors add to it, or as it came."""
    return factor + returned.dense() if isinstance(returned, LowRank) else returned


def _is_lean(factor: Tensor, r_i: int) -> bool:
    """Whether two factors of rank ``r_i`` take fewer numbers than this one."""
    return r_i * sum(factor.shape) < factor.numel()


def _uniform(rows: int, r: int, generator: torch.Generator) -> Tensor:
    """``(rows, r)``, drawn as torch.nn.Linear draws a map from r to rows."""
    return (torch.rand(rows, r, generator=generator) * 2 - 1) * r**-0.5


def zeros(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns)
