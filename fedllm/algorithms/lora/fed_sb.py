"""Fed-SB (Singhal et al., 2025): a small square matrix trains and travels, between two fixed factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedllm.algorithms.lora.fedit import FedIT, of_one_rank
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within
from fedllm.lowrank import LowRank, plus
from fedllm.mean import mean


@dataclass(frozen=True)
class FedSB(FedIT):
    """``W = B (sum p_i R_i) A``: exactly the mean of ``B R_i A``, and ``r^2`` numbers a module travel each way.

    B and A are orthonormal, drawn from the run's seed on both sides and never sent, and R starts at zero. The paper
    takes them from the first gradients on all clients' data, and starts R at their singular values. With one head and
    its scalar fixed at 1, RAVAN (Raje, Askin, Jhunjhunwala, Joshi, NeurIPS 2025) is this rule.

    State: ``R/name``, ``shape/name``, the ``seed``, and ``frozen/name``, what the run goes on from.
    """

    differs: ClassVar[str] = "a random basis and R = 0 at the start; RAVAN's heads and scalars are left out"
    plain_mean: ClassVar[bool] = True

    def validate(self, clients: Sequence[Client]) -> None:
        of_one_rank(clients, "zero_padding, rbla, flexlora, raflora, flora or fedhl")

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        r = max(client.rank for client in clients)
        state: dict[str, Any] = {}
        for name, W in model.weights.items():
            size = min(r, *W.shape)
            state |= {f"R/{name}": torch.zeros(size, size), f"shape/{name}": torch.tensor(W.shape)}
            state[f"frozen/{name}"] = model.update.get(name, LowRank.zeros(*W.shape))
        return state

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        frozen = {n: W for n, W in within("frozen", state).items() if not isinstance(W, LowRank) or W.rank}
        R, shape = under("R", within("R", state)), under("shape", within("shape", state))
        return {**R, **shape, **under("frozen", frozen), "seed": torch.tensor(rnd.seed)}

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        R, bases = within("R", sent), _bases(sent)
        one = {name: torch.eye(len(value)).to(value) for name, value in R.items()}
        inner = {f"A/{name}": LowRank(R[name] - one[name], M.A) for name, M in bases.items()}  # B (1 + R - 1) A
        frozen = within("frozen", sent)
        trained, kept, metrics = worker.train(bases, memory, rnd, frozen=frozen, nested=inner, factors="B")
        return LocalResult(under("R", {n: trained[f"A/{n}"].B + one[n] for n in bases}), kept, metrics)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        R = {name: mean([reply.returned[name] for reply in replies], weights) for name in replies[0].returned}
        return {**state, **R, "seed": replies[0].sent["seed"]}

    def served(self, state: Tensors) -> Tensors:
        frozen = within("frozen", state)
        return _added(frozen, _products(state, state)) if "seed" in state else frozen

    def expected(self, reply: Reply) -> Tensors:
        return under("R", within("R", reply.sent))

    def trained(self, reply: Reply) -> Tensors:
        return _products(reply.sent, reply.returned)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return _added(within("frozen", reply.sent), self.trained(reply))


def _bases(tensors: Tensors) -> dict[str, LowRank]:
    """B with orthonormal columns and A with orthonormal rows, of the seed and the name alone."""
    bases, drawing = {}, Round(0, int(tensors["seed"]))
    for name, shape in within("shape", tensors).items():
        r, (d_out, d_in), rng = len(tensors[f"R/{name}"]), shape.tolist(), drawing.rng("basis", name)
        B, A = (torch.linalg.qr(torch.randn(d, r, generator=rng)).Q for d in (d_out, d_in))
        bases[name] = LowRank(B, A.T.contiguous())
    return bases


def _products(known: Tensors, R: Tensors) -> dict[str, LowRank]:
    """``B R A`` by module."""
    return {name: LowRank(M.B.to(R[f"R/{name}"]) @ R[f"R/{name}"], M.A) for name, M in _bases(known).items()}


def _added(frozen: Tensors, products: Tensors) -> dict[str, LowRank | Tensor]:
    return {name: plus(frozen[name], M) if name in frozen else M for name, M in products.items()}
