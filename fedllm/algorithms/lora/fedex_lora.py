"""FedEx-LoRA (Singhal, Ponkshe, Vepakomma, ACL 2025): factors are averaged, what that misses joins the frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedllm.algorithms.lora.fedit import FedIT, started
from fedllm.config.types import Whole
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within
from fedllm.lowrank import LowRank, cheapest, plus
from fedllm.mean import mean_factors, mean_products


@dataclass(frozen=True)
class Residual(FedIT):
    """``sum p_i M_i`` is parted in two: an adapter that goes on training, and a rest that joins W, frozen.

    All of W is sent, as FLoRA sends it, and ``W + B A`` is served. State: ``adapter/name`` and ``W/name``.
    """

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        zero = {name: LowRank.zeros(*weight.shape) for name, weight in model.weights.items()}
        return under("adapter", zero) | under("W", {**zero, **model.update})

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        fresh = started(within("adapter", state), client.rank, rnd)
        return under("frozen", within("W", state)) | under("adapter", fresh)

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        return worker.train(within("adapter", sent), memory, rnd, frozen=within("frozen", sent))

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        after: dict[str, Any] = {}
        for name, W in within("W", state).items():
            adapter, residual = self.parted([reply.returned[name] for reply in replies], weights)
            after |= {f"adapter/{name}": adapter, f"W/{name}": cheapest(plus(W, residual))}
        return after

    def parted(self, updates: Sequence[LowRank], weights: Sequence[float]) -> tuple[LowRank, LowRank]:
        """The adapter, and the rest."""
        raise NotImplementedError

    def served(self, state: Tensors) -> Tensors:
        return {name: plus(W, state[f"adapter/{name}"]) for name, W in within("W", state).items()}

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        frozen = within("frozen", reply.sent)
        return {name: plus(frozen[name], update) for name, update in reply.returned.items()}


@dataclass(frozen=True)
class FedExLoRA(Residual):
    """``W <- W + sum p_i B_i A_i - B A`` beside FedIT's means ``B`` and ``A``.

    The rest is ``sum p_i (B_i - B)(A_i - A)``, since ``sum p_i = 1``: no large terms cancel.

    Args:
        residual_rank: adds the best approximation of this rank alone, for fewer bytes; an option of ours.
    """

    differs: ClassVar[str] = "weights n_i / n, not 1 / K; the residual stays in float32 beside the base"

    residual_rank: Whole | None = None

    def parted(self, updates: Sequence[LowRank], weights: Sequence[float]) -> tuple[LowRank, LowRank]:
        mean = mean_factors(updates, weights)
        rest = mean_products([LowRank(M.B - mean.B, M.A - mean.A) for M in updates], weights).balanced()
        return mean, rest if self.residual_rank is None else rest.leading(self.residual_rank)
