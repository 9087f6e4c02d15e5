"""Every weighted average we have. A mean of factors is not a mean of products: the name says which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm.lowrank import LowRank


def mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i p_i T_i``, in float32 or better, in the order given."""
    total = torch.zeros_like(tensors[0], dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(total.dtype), alpha=weight)
    return total


def mean_products(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """``sum_i p_i B_i A_i``, exact: the stack ``[p_1 B_1, ..., p_m B_m] [A_1; ...; A_m]`` of rank ``sum_i r_i``."""
    return LowRank(
        torch.cat([(update * weight).B for update, weight in zip(updates, weights, strict=True)], dim=1),
        torch.cat([update.A for update in updates], dim=0),
    )


def mean_factors(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """``(sum_i p_i B_i) (sum_i p_i A_i)``: what averaging two sets of weights does to their product. Not linear in M_i.

    Raises:
        ValueError: where the ranks differ.
    """
    ranks = sorted({update.rank for update in updates})
    if len(ranks) > 1:
        raise ValueError(f"factors of ranks {ranks} cannot be averaged entrywise: pad them, or average the products.")
    return LowRank(mean([u.B for u in updates], weights), mean([u.A for u in updates], weights))


def mean_columns(
    start: LowRank, updates: Sequence[LowRank], places: Sequence[Tensor], weights: Sequence[float]
) -> LowRank:
    """``start`` with column j of B and row j of A the mean over those that have one, ``sum (p_i / P_j) b_ij``.

    Args:
        places: which columns of ``start`` each update's are. What nobody has stays, to the bit.
    """
    held = torch.zeros(start.rank, dtype=torch.float64)  # P_j
    B = torch.zeros_like(start.B, dtype=torch.promote_types(updates[0].B.dtype, torch.float32))
    A = torch.zeros_like(start.A, dtype=torch.promote_types(updates[0].A.dtype, torch.float32))
    for update, place, weight in zip(updates, places, weights, strict=True):
        held[place] += weight
        B[:, place] += weight * update.B.to(B)
        A[place] += weight * update.A.to(A)
    share = torch.where(held > 0, held, 1.0)
    return LowRank(
        torch.where(held > 0, B / share.to(B), start.B.to(B)),
        torch.where(held[:, None] > 0, A / share.to(A)[:, None], start.A.to(A)),
    )


def mean_directions(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """``sum_j sum_(r_i >= j) (p_i / P_j) b_ij a_ij``, a stack: each direction is the mean over its owners."""
    held = _held(updates, weights)
    scaled = [
        LowRank(
            (update * weight).B / held[: update.rank].to(torch.promote_types(update.B.dtype, torch.float32)), update.A
        )
        for update, weight in zip(updates, weights, strict=True)
    ]
    return mean_products(scaled, [1.0] * len(scaled))


def _held(updates: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """``P_j``, the weight of all whose rank is at least j: ``(r_max,)``, float64."""
    held = torch.zeros(max(update.rank for update in updates), dtype=torch.float64)
    for update, weight in zip(updates, weights, strict=True):
        held[: update.rank] += weight
    return held


def mean_values(values: Sequence[Tensor | LowRank], weights: Sequence[float]) -> Tensor | LowRank:
    """Of what clients return under one name: the mean of factors, or of tensors; of counters the first one's."""
    first = values[0]
    if isinstance(first, LowRank):
        return mean_factors([value for value in values if isinstance(value, LowRank)], weights)
    tensors = [value for value in values if isinstance(value, Tensor)]
    return mean(tensors, weights) if first.is_floating_point() else first


def pad(update: LowRank, r: int) -> LowRank:
    """The same product as factors of rank ``r``, zeros in the new columns of B and rows of A.

    Raises:
        ValueError: where ``r`` is below the rank of ``update``.
    """
    extra = r - update.rank
    if extra < 0:
        raise ValueError(f"a product of rank {update.rank} cannot be padded to rank {r}: truncate it first.")
    return LowRank(
        torch.nn.functional.pad(update.B, (0, extra)),
        torch.nn.functional.pad(update.A, (0, 0, 0, extra)),
    )
