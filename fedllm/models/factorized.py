"""Convolutions, linear layers and embeddings as a product of two: FedLMT's, pFedLMT's and FedHM's one primitive.

``M[(o,a),(i,b)] = W[o,i,a,b]`` is ``(k c_out, k c_in)``; ``M = U V^T`` is a 1 x k convolution with V's columns followed
by a k x 1 convolution with U's. The rank is ``round(alpha c_out)``, which FedLMT's Table 1 needs; its Def. 3.1 differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedllm.errors import FedError
from fedllm.lowrank import LowRank, smallest, truncate_dense
from fedllm.models.build import replace
from fedllm.structure import Anatomy

Factors = tuple[Tensor, Tensor]
Net = TypeVar("Net", bound=nn.Module)


class FactorConv(nn.Module):
    """``W = U V^T`` as two convolutions, nothing between them.

    first.weight: ``(r, c_in, 1, k)``, ``V[(i,b), r]``; stride and padding act on the width.
    second.weight: ``(c_out, r, k, 1)``, ``U[(o,a), r]``; stride and padding act on the height.
    The first one still runs at full input height: fewer parameters, not always fewer operations.
    """

    def __init__(self, c_in: int, c_out: int, k: int, rank: int, stride: int = 1, padding: int = 0, bias: bool = False):
        super().__init__()
        self.first = nn.Conv2d(c_in, rank, (1, k), (1, stride), (0, padding), bias=False)
        self.second = nn.Conv2d(rank, c_out, (k, 1), (stride, 1), (padding, 0), bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (N, c_in, H, W)
        return self.second(self.first(x))


class FactorLinear(nn.Module):
    """``W = U V^T``: first.weight ``V^T (r, d_in)``, second.weight ``U (d_out, r)``; the bias stays with the second."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool = True):
        super().__init__()
        self.first = nn.Linear(d_in, rank, bias=False)
        self.second = nn.Linear(rank, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class FactorEmbedding(nn.Module):
    """A table ``(V, d) = U V^T`` in FactorLinear's layout: first.weight ``V^T (r, d)``, second.weight ``U (V,r)``."""

    def __init__(self, entries: int, d: int, rank: int):
        super().__init__()
        self.first = nn.Linear(d, rank, bias=False)
        self.second = nn.Embedding(entries, rank)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(tokens) @ self.first.weight  # (..., r) @ (r, d)


def rank_of(layer: nn.Module, alpha: float) -> int:
    """``max(1, round(alpha c))`` by Python's rounding (halves to even), never more than the full rank."""
    return min(max(1, round(alpha * _channels(layer))), full_rank(layer))


def _channels(layer: nn.Module) -> int:
    """What alpha counts in: ``c_out`` of a convolution, ``min(d_in, d_out)`` of a linear layer, ``d`` of a table."""
    match layer:
        case nn.Conv2d(out_channels=c):
            return c
        case nn.Linear(in_features=d_in, out_features=d_out):
            return min(d_in, d_out)
        case nn.Embedding(embedding_dim=d):
            return d
    raise FedError(f"a {type(layer).__name__} cannot be factorised: a convolution, linear or embedding can.")


def full_rank(layer: nn.Module) -> int:
    """``min(k c_out, k c_in)`` of a convolution; the smaller side of a matrix."""
    match layer:
        case nn.Conv2d(in_channels=c_in, out_channels=c_out, kernel_size=(k, _)):
            return k * min(c_in, c_out)
    return min(_weight(layer).shape)


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight")


def ranks(model: nn.Module, anatomy: Anatomy, rho: int, alpha: float) -> dict[str, int]:
    """Layer name -> rank, of every layer after the first ``rho``: FedLMT's hybrid (rho, alpha)."""
    return {name: rank_of(model.get_submodule(name), alpha) for name in anatomy.factorable(rho)}


def clamped(model: nn.Module, anatomy: Anatomy, rho: int, alpha: float) -> tuple[str, ...]:
    """The layers whose rank by alpha would exceed the full rank: worth a line in a report."""
    layers = {name: model.get_submodule(name) for name in anatomy.factorable(rho)}
    return tuple(name for name, layer in layers.items() if round(alpha * _channels(layer)) > full_rank(layer))


def factorize(model: Net, layer_ranks: Mapping[str, int]) -> Net:
    """Replaces the layers in place by empty factors of these ranks; returns the model.

    Values come from ``model.initialize(generator)``, or from ``load_state_dict(split_weights(...))``: spectral init.
    """
    for name, rank in layer_ranks.items():
        layer = model.get_submodule(name)
        with torch.device("meta"):
            factored = _factored(layer, rank)
        replace(model, name, factored.to_empty(device=_weight(layer).device))
    return model


def _factored(layer: nn.Module, rank: int) -> nn.Module:
    match layer:
        case nn.Conv2d(kernel_size=(k, width), stride=(s, _), padding=(p, _)) if k == width and layer.groups == 1:
            return FactorConv(layer.in_channels, layer.out_channels, k, rank, s, p, layer.bias is not None)
        case nn.Linear():
            return FactorLinear(layer.in_features, layer.out_features, rank, layer.bias is not None)
        case nn.Embedding():
            return FactorEmbedding(layer.num_embeddings, layer.embedding_dim, rank)
    raise FedError(f"{layer} cannot be factorised: a square convolution without groups, a linear or an embedding can.")


def to_matrix(W: Tensor) -> Tensor:
    """``(c_out, c_in, k, k)`` -> ``(k c_out, k c_in)``; a matrix stays. Permuted, then reshaped: not M otherwise."""
    if W.ndim == 2:
        return W
    c_out, c_in, height, width = W.shape
    return W.permute(0, 2, 1, 3).reshape(c_out * height, c_in * width)


def from_matrix(M: Tensor, k: int) -> Tensor:
    """The inverse for a k x k convolution: ``(k c_out, k c_in)`` -> ``(c_out, c_in, k, k)``."""
    return M.reshape(M.shape[0] // k, k, M.shape[1] // k, k).permute(0, 2, 1, 3).contiguous()


def product(first: Tensor, second: Tensor) -> LowRank:
    """Two convolution or linear weights as ``U V^T``: ``B = U (k c_out, r)``, ``A = V^T (r, k c_in)``."""
    if first.ndim == 2:
        return LowRank(second, first)
    return LowRank(second.permute(0, 2, 1, 3).flatten(0, 1).squeeze(-1), first.flatten(1))


def weights_of(UV: LowRank, k: int | None) -> Factors:
    """``first, second`` of a k x k convolution (None: a linear layer): the inverse of ``product``."""
    if k is None:
        return UV.A, UV.B
    first = UV.A.reshape(UV.rank, -1, 1, k)
    second = UV.B.reshape(-1, k, UV.rank).transpose(1, 2)[..., None]
    return first.contiguous(), second.contiguous()


def split(W: Tensor, rank: int, generator: torch.Generator | None = None) -> Factors:
    """``first, second`` of ``W``'s best approximation: ``U_r sqrt(S_r)`` and ``V_r sqrt(S_r)``.

    Args:
        W: ``(c_out, c_in, k, k)`` or ``(d_out, d_in)``.
        rank: columns of the factors.
        generator: where W's own rank is smaller, surplus directions get a zero column in U, and in V a fresh column
            drawn from it; zeros without one, which never train.
    """
    first, second = weights_of(truncate_dense(to_matrix(W), rank, generator), W.shape[-1] if W.ndim == 4 else None)
    return first.to(W), second.to(W)


def recover(first: Tensor, second: Tensor) -> Tensor:
    """``W = U V^T`` in the shape of the layer that was split."""
    M = product(first, second).dense()
    return M if first.ndim == 2 else from_matrix(M, first.shape[-1])


def split_weights(
    weights: Mapping[str, Tensor], layer_ranks: Mapping[str, int], generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """A full model's weights as those of its factorised twin; a bias goes with the second factor."""
    parts: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        if layer not in layer_ranks:
            parts[name] = tensor
        elif kind == "bias":
            parts[f"{layer}.second.bias"] = tensor
        else:
            parts[f"{layer}.first.weight"], parts[f"{layer}.second.weight"] = split(
                tensor, layer_ranks[layer], generator
            )
    return parts


def recover_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The full model's weights, under the full model's names: the inverse of ``split_weights`` up to the truncation."""
    whole: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        if name.endswith(".first.weight") and f"{layer[:-6]}.second.weight" in weights:
            whole[f"{layer[:-6]}.weight"] = recover(tensor, weights[f"{layer[:-6]}.second.weight"])
        elif name.endswith(".second.bias"):
            whole[f"{layer[:-7]}.bias"] = tensor
        elif not name.endswith(".second.weight"):
            whole[name] = tensor
    return whole


SIDE = 256
"""Smaller side of the largest whole convolution that ``smallest_singular_values`` looks at: milliseconds each."""


def smallest_singular_values(weights: Mapping[str, Any]) -> dict[str, float]:
    """Layer -> smallest singular value: of U and of V, the smaller one, where it is ``U V^T``; or of a convolution's M.

    FedLMT (Liu et al., 2024), Assumption 4.4 and Figure 8: a stationary point of the factors is one of the network that
    they stand for only while this stays above 0.
    """
    found: dict[str, float] = {}
    for name, W in weights.items():
        layer, second = name.removesuffix(".first.weight"), name.replace(".first.", ".second.")
        if name.endswith(".first.weight") and second in weights:
            UV = product(W, weights[second])
            found[layer] = min(smallest(UV.B), smallest(UV.A))
        elif name.endswith(".weight") and not name.endswith(".second.weight") and isinstance(W, Tensor) and W.ndim == 4:
            M = to_matrix(W)
            if min(M.shape) <= SIDE:
                found[name.removesuffix(".weight")] = smallest(M)
    return found


def frobenius_decay(UV: LowRank) -> Tensor:
    """``||U V^T||_F^2 = tr((U^T U)(V^T V))``, through r x r Gram matrices; differentiable, no 1/2."""
    return ((UV.B.T @ UV.B) * (UV.A @ UV.A.T)).sum()


def l2_decay(UV: LowRank) -> Tensor:
    """``||U||_F^2 + ||V||_F^2``."""
    return UV.B.square().sum() + UV.A.square().sum()


def kronecker_decay(UV: LowRank) -> Tensor:
    """``||U||_F^2 ||V||_F^2``, an upper bound of the Frobenius decay."""
    return UV.B.square().sum() * UV.A.square().sum()


DECAYS = {"frobenius": frobenius_decay, "l2": l2_decay, "kronecker": kronecker_decay}
"""FedLMT's regularisers by name; each is summed over the factorised layers and added with its own coefficient."""


def products(model: nn.Module) -> dict[str, LowRank]:
    """Layer name -> ``U V^T`` of every factorised layer, attached to the model's graph."""
    return {
        name: product(module.first.weight, module.second.weight)
        for name, module in model.named_modules()
        if isinstance(module, (FactorConv, FactorLinear, FactorEmbedding))
    }


def decay(model: nn.Module, coefficients: Mapping[str, float]) -> Tensor:
    """``sum_name lambda_name sum_layers decay_name(U, V)``, the term added to the loss."""
    terms = [weight * DECAYS[name](UV) for name, weight in coefficients.items() for UV in products(model).values()]
    return torch.stack(terms).sum() if terms else torch.zeros(())
