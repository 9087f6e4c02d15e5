"""FedHM (Yao et al., 2021): the network is factorised for every capacity, and the products of the factors averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.algorithms.networks.fedlmt import penalty
from fedllm.config.types import Count, NonNegative, Positive, Whole
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within
from fedllm.errors import FedError
from fedllm.models.factorized import ranks, recover_weights, split_weights

ALPHAS = {"b1": 0.01, "b2": 0.15, "b3": 0.6, "b4": 1.4}
"""Capacity level -> rank ratio (FedLMT's Table 1, with rho 9). Level b4 is low-rank too."""


@dataclass(frozen=True)
class FedHM(FedAvg):
    """``W = sum p_i U_i V_i^T``; client i trains ``U_i, V_i``, the best approximation of W at its own rank.

    One SVD a layer and round serves all ranks: a smaller approximation is the first columns of a larger one. Factors
    that separate SVDs made are never averaged, their signs and rotations are arbitrary.

    Args:
        rho: numbered layers that stay whole.
        alphas: rank ratio by capacity level.
        alpha: one ratio for all clients instead.
        svd_every: rounds between two such steps, factors being averaged in between (FedHMv2, which needs one ratio):
            1 is FedHM, ``null`` (never) is FedLMT from a spectral start.
        decay: as FedLMT's.
        weighting: ``uniform`` (the paper's Algorithm 2) or ``data``.
    """

    rho: Whole = 9
    alphas: Mapping[str, Positive] = field(default_factory=lambda: dict(ALPHAS))
    alpha: Positive | None = None
    svd_every: Count | None = 1
    decay: Mapping[str, NonNegative] = field(default_factory=dict)
    weighting: Literal["data", "uniform"] = "uniform"

    def validate(self, clients: Sequence[Client]) -> None:
        if self.alpha is None and self.svd_every != 1 and len({self.ratio(client) for client in clients}) > 1:
            raise FedError(
                f"svd_every={self.svd_every} averages factors in between, which needs one rank for all: "
                "give algorithm.alpha, or svd_every=1."
            )

    def ratio(self, client: Client) -> float:
        """The client's alpha; a client without a level has that of b4."""
        return self.alphas[client.level or "b4"] if self.alpha is None else self.alpha

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        net, alphas = model.make(), sorted({self.ratio(client) for client in clients})
        chosen = {alpha: ranks(net, model.anatomy, self.rho, alpha) for alpha in alphas}
        state: dict[str, Any] = {}
        for alpha, of in chosen.items():
            state |= under(f"rank/{alpha}", {layer: torch.tensor(r) for layer, r in of.items()})
        return state | self._split(model.weights, chosen[alphas[-1]])

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        sent = {}
        rank = {layer: int(r) for layer, r in within(f"rank/{self.ratio(client)}", state).items()}
        for name, tensor in within("factors", state).items():
            layer = name.rpartition(".")[0]
            if name.endswith(".first.weight"):
                tensor = tensor[: rank[layer.removesuffix(".first")]]
            elif name.endswith(".second.weight"):
                tensor = tensor[:, : rank[layer.removesuffix(".second")]]
            sent[name] = tensor
        return sent

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        return worker.train(sent, memory, rnd, penalty=penalty(self.decay))

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        kept = {name: tensor for name, tensor in state.items() if name.startswith("rank/")}
        if self.svd_every is None or rnd.index % self.svd_every:
            return kept | under("factors", self.averaged(state, replies))
        full = [Reply(r.client, r.sent, recover_weights(r.returned), r.metrics) for r in replies]
        return kept | self._split(self.averaged(state, full), self._largest(state))

    def served(self, state: Tensors) -> Tensors:
        """The average before it is truncated."""
        return {**recover_weights(within("factors", state)), **within("full", state)}

    def _split(self, weights: Tensors, chosen: Mapping[str, int]) -> dict[str, Any]:
        """``factors`` at the largest rank, and the layers they came from."""
        full = {f"{layer}.weight": weights[f"{layer}.weight"] for layer in chosen}
        factors = split_weights(weights, chosen, torch.Generator().manual_seed(0))
        return {**under("factors", factors), **under("full", full)}

    def _largest(self, state: Tensors) -> dict[str, int]:
        first = ".first.weight"
        return {n.removesuffix(first): len(t) for n, t in within("factors", state).items() if n.endswith(first)}
