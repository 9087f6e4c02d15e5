"""FedKD (Wu et al., 2022): FML that trusts teachers less the more they err, and compresses what travels by SVD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, mse_loss

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.algorithms.own_models.fml import taught
from fedllm.algorithms.personal import head_shape, own, scored
from fedllm.config.types import Share
from fedllm.core import Client, ClientWorker, LocalResult, Reply, Round, Tensors
from fedllm.lowrank import LowRank, as_lowrank
from fedllm.mean import pad
from fedllm.models.paired import Beside, joined, part_of
from fedllm.structure import Features, FedModel


@dataclass(frozen=True)
class FedKD(FedAvg):
    """``CE_p + (KL(z_s || z_p) + H) / (CE_p + CE_s)`` for the private network, and the same with p and s exchanged.

    ``H = mean((R_p - W R_s)^2)`` compares the representations through a private matrix ``W``; it counts once. The
    divisor gets no gradient. Every weight of the shared network travels as its SVD, cut at the smallest rank that keeps
    ``E(t)`` of the squared singular values, or whole where that is smaller.

    Args:
        energy, final_energy: E(t) in the first and the last round, linear between.
    """

    at_most: ClassVar[str] = "a weight travels as its SVD where that is smaller, at a rank that its values decide"
    own_entries: ClassVar[str] = "a client's values decide at which rank its weights travel"

    energy: Share = 0.95
    final_energy: Share = 0.98

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return compressed(state, self.kept(rnd))

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        like, d = worker.shared.weights, (head_shape(worker.model)[1], head_shape(worker.shared)[1])
        start = memory or joined(own=own(worker, {}), map=drawn_map(d, rnd.rng("map", worker.client.id)))
        trained, _, metrics = worker.train(
            {**start, **joined(shared=decompressed(sent, like))}, {}, rnd,
            network=lambda: Beside(own=worker.model.make(), shared=worker.shared.make(), map=Map(*d)),
            forward=lambda net, x: (net.own.features(x), net.shared.features(x), net.map.weight),
            loss=self.distilled,
        )  # fmt: skip
        omega = part_of("own", trained)
        kept = {**joined(own=omega), **joined(map=part_of("map", trained))}
        return LocalResult(compressed(part_of("shared", trained), self.kept(rnd)), kept, scored(worker, omega, metrics))

    def distilled(self, seen: tuple[Features, Features, Tensor], y: Tensor) -> Tensor:
        p, s, W = seen
        errors = cross_entropy(p.logits, y) + cross_entropy(s.logits, y)
        hidden = mse_loss(linear(s.representation, W), p.representation)
        return errors + (taught(p.logits, by=s.logits) + taught(s.logits, by=p.logits) + hidden) / errors.detach()

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        return super().aggregate(state, [replace(r, returned=decompressed(r.returned, state)) for r in replies], rnd)

    def expected(self, reply: Reply) -> Tensors:
        """What was sent, at the ranks that came back: a trained matrix needs another one."""
        return {name: _as_came(W, reply.returned.get(name)) for name, W in reply.sent.items()}

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return part_of("own", memory)

    def trained(self, reply: Reply) -> Tensors:
        return {}  # pieces of weights, by the shapes of their SVD: no updates that could be measured

    def kept(self, rnd: Round) -> float:
        """E(t)."""
        done = (rnd.index - 1) / max(rnd.rounds - 1, 1)
        return self.energy + (self.final_energy - self.energy) * min(done, 1.0)


class Map(FedModel):
    """``W (d_own, d_shared)``, private to a client."""

    def __init__(self, d_own: int, d_shared: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(d_own, d_shared, device="meta"))


def drawn_map(d: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """W before the client's first round, as PyTorch draws a linear layer."""
    return {"weight": (2 * torch.rand(*d, generator=generator) - 1) * d[1] ** -0.5}


def compressed(weights: Tensors, energy: float) -> dict[str, Any]:
    """Matrices and convolutions ``(c_out, c_in k^2)`` as products of the fewest columns that keep this energy."""
    return {name: W if W.ndim < 2 or W.is_meta else _cut(W, energy) for name, W in weights.items()}  # meta: a plan


def _cut(W: Tensor, energy: float) -> Tensor | LowRank:
    U, S, Vh = as_lowrank(W.flatten(1)).svd()
    part = S.double().square().cumsum(0)
    q = min(int((part < energy * part[-1]).sum()) + 1, len(S))
    cut = LowRank((U[:, :q] * S[:q]).to(W.dtype), Vh[:q].to(W.dtype))
    return cut if cut.B.numel() + cut.A.numel() < W.numel() else W


def decompressed(weights: Tensors, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the network's own shapes again."""
    return {name: W.dense().reshape(like[name].shape) if isinstance(W, LowRank) else W for name, W in weights.items()}


def _as_came(W: Tensor | LowRank, came: Any) -> Tensor | LowRank:
    if isinstance(came, LowRank):
        product = W if isinstance(W, LowRank) else as_lowrank(W.flatten(1))
        return product.truncate(came.rank) if came.rank < product.rank else pad(product, came.rank)
    return W.dense().reshape(came.shape) if isinstance(W, LowRank) and isinstance(came, Tensor) else W
