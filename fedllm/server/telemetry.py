"""What a round did to the update, measured cheaply: why a rule loses, while it loses.

Norms and inner products are taken of sketches ``M X``, ``X`` a seeded ``(d_in, m)`` matrix of signs, ``E[X X^T] = I``,
so ``E |M X|^2 = |M|_F^2``: a few thin products a module however large and dense ``M`` is, where exact norms would cost
a QR of thousands of columns. Up to ``EXACT`` columns ``X`` is the identity, so small models have exact numbers. What is
zero is measured as zero (to rounding) either way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedllm.core import Algorithm, Reply, Tensors
from fedllm.lowrank import LowRank
from fedllm.models.factorized import smallest_singular_values

EXACT = 128
"""Widest matrix whose numbers are exact."""

PROBES = 16
"""Columns of ``X`` beyond that. The norm of a matrix of rank 1 is then known to 18 %, of 32 such modules to 3 %."""

MODULES, SPECTRA = 32, 16
"""At most so many modules, evenly spaced over the model, are looked at, and the singular values of so many."""

WIDEST = 128
"""Largest rank whose SVD is taken where the rule has none at hand."""


def measure(algorithm: Algorithm, before: Tensors, after: Tensors, replies: Sequence[Reply]) -> dict[str, Any]:
    """A round's line under ``telemetry``: plain numbers, empty where nothing of the rule's state is a matrix.

    - ``served_error``: ``|| W' - T ||_F / || T ||_F`` over the whole model, ``W'`` what is served now and
      ``T = W + sum p_i (M_i - S_i)`` what is ideal: the mean of the clients' steps as products, from ``S_i`` (sent) to
      ``M_i`` (returned), upon what was served before. It is FedIT's cross terms, zero-padding's dilution, and what
      FlexLoRA's truncation cut off and no client returned; FedHL, FLoRA have none. In FedLoRU's rounds that begin with
      an accumulation, ``reset: momentum`` adds the last adapter a second time, and that step is in it too.
    - ``truncation``: by rank ``r``, ``|| W' - W'^(r) ||_F / || W' ||_F``.
    - ``rank``: ``stable``, ``|W'|_F^2 / s_1^2``, and ``effective``, the exponential of the entropy of
      ``s_j^2 / |W'|_F^2`` (what lies beyond the known ``s_j`` counts as few directions as can be); means over modules.
    - ``singular_values``: of ``W'`` by place, root mean squares over modules.
    - ``drift``: by client, ``|| M_i - S_i ||_F`` over the whole model; ``cosine``: between that step and the mean step.
    - ``smallest_singular_value``: of a network, by layer, whole and factorised (``smallest_singular_values``).

    ``p_i`` are the rule's shares for the whole model: with FedHL's ``weights_per: module`` the error holds the
    difference of the two.
    """
    was, served = algorithm.served(before), algorithm.served(after)
    shares = algorithm.shares(before, replies)
    p = [shares[reply.client.id] for reply in replies]
    starts = [algorithm.trained(replace(reply, returned=algorithm.expected(reply))) for reply in replies]
    ends = [algorithm.trained(reply) for reply in replies]
    names = [name for name in served if all(_is_matrix(of.get(name)) for of in (was, served, *starts, *ends))]
    names = [name for name in names if len({tuple(of[name].shape) for of in (was, served, *ends)}) == 1]
    names, all_of_them = _spaced(names, MODULES), len(names)
    smallest = smallest_singular_values(served)
    conditioning = {"smallest_singular_value": smallest} if smallest else {}
    if not names:
        return conditioning
    X = {width: probes(width) for width in {served[name].shape[1] for name in names}}
    error = ideal = 0.0
    norms, dots, whole = [0.0] * len(replies), [0.0] * len(replies), 0.0
    for name in names:
        x = X[served[name].shape[1]]
        steps = [sketch(end[name], x) - sketch(start[name], x) for start, end in zip(starts, ends, strict=True)]
        mean = sum((share * step for share, step in zip(p, steps, strict=True)), torch.zeros_like(steps[0]))
        target = sketch(was[name], x).add_(mean)
        ideal += _square(target)
        error += _square(target.sub_(sketch(served[name], x)))
        whole += _square(mean)
        norms = [norm + _square(step) for norm, step in zip(norms, steps, strict=True)]
        dots = [dot + float((step * mean).sum(dtype=torch.float64)) for dot, step in zip(dots, steps, strict=True)]
    ids = [reply.client.id for reply in replies]
    return {
        "served_error": _ratio(math.sqrt(error), math.sqrt(ideal)),
        **_spectra([spectrum(after, name, served[name], X) for name in _spaced(names, SPECTRA)], replies),
        "drift": {i: math.sqrt(norm * all_of_them / len(names)) for i, norm in zip(ids, norms, strict=True)},
        "cosine": {i: _ratio(dot, math.sqrt(norm * whole)) for i, dot, norm in zip(ids, dots, norms, strict=True)},
        **conditioning,
    }


def probes(width: int) -> Tensor:
    """``X``: ``(width, m)``, the same for every module, client and round."""
    if width <= EXACT:
        return torch.eye(width)
    signs = torch.randint(0, 2, (width, PROBES), generator=torch.Generator().manual_seed(width))
    return (2.0 * signs - 1.0) / PROBES**0.5


def sketch(M: LowRank | Tensor, X: Tensor) -> Tensor:
    """``M X``: ``(d_out, m)``, in float32 or better."""
    if isinstance(M, LowRank):
        dtype = torch.promote_types(_compute(M.B[:0]).dtype, _compute(M.A[:0]).dtype)
        return M.B.to(dtype) @ (M.A.to(dtype) @ X.to(M.A.device, dtype))
    return _compute(M) @ X.to(M.device, _compute(M[:0]).dtype)


@dataclass(frozen=True)
class Spectrum:
    """Leading singular values, in order, and the norm of all that lies behind them."""

    S: Tensor
    rest: float

    def beyond(self, r: int) -> float | None:
        """``|| W - W^(r) ||_F``; None where that is not known."""
        if r > len(self.S) and self.rest:
            return None
        return math.hypot(float(self.S[r:].norm()), self.rest)


def spectrum(state: Tensors, name: str, W: LowRank | Tensor, X: Mapping[int, Tensor]) -> Spectrum:
    """An SVD where that is small, what the rule keeps of it anyway (``top/`` and ``error/``), or else an estimate.

    The estimate projects W onto its sketch's span: its singular values are no larger than the true ones.
    """
    if isinstance(W, LowRank) and W.rank <= WIDEST:
        return Spectrum(W.balanced().B.norm(dim=0).double().square(), 0.0)
    if f"top/{name}" in state and f"error/{name}" in state:
        top = state[f"top/{name}"]
        return Spectrum(top.B.norm(dim=0).double() * top.A.norm(dim=1).double(), float(state[f"error/{name}"][-1]))
    Y = sketch(W, X[W.shape[1]])
    Q = torch.linalg.qr(Y).Q  # (d_out, m)
    Z = (Q.T @ _compute(W.B)) @ _compute(W.A) if isinstance(W, LowRank) else Q.T @ _compute(W)
    S = torch.linalg.svdvals(Z).double()
    size = _square(Y) if isinstance(W, LowRank) else _square(W)
    return Spectrum(S, math.sqrt(max(0.0, size - float(S.square().sum()))))


def _spectra(spectra: Sequence[Spectrum], replies: Sequence[Reply]) -> dict[str, Any]:
    spectra = [found for found in spectra if len(found.S) and float(found.S[0]) > 0]
    if not spectra:
        return {}
    squares = [found.beyond(0) ** 2 for found in spectra]  # type: ignore[operator]
    served = max(reply.client.rank for reply in replies)  # beyond it, a rule knows the values of some rounds only
    longest = min(max(len(found.S) for found in spectra), served or WIDEST)
    places = [2**k for k in range(longest.bit_length()) if 2**k <= longest]
    truncation = {}
    for r in sorted({reply.client.rank for reply in replies} | set(places)):
        cut = [found.beyond(r) for found in spectra]
        known = [value for value in cut if value is not None]
        if r and len(known) == len(cut):
            truncation[str(r)] = math.sqrt(sum(value**2 for value in known) / sum(squares))
    return {
        "truncation": truncation,
        "rank": {
            "effective": _mean(_effective(found, square) for found, square in zip(spectra, squares, strict=True)),
            "stable": _mean(square / float(found.S[0]) ** 2 for found, square in zip(spectra, squares, strict=True)),
        },
        "singular_values": {
            str(j): math.sqrt(_mean(float(found.S[j - 1]) ** 2 if j <= len(found.S) else 0.0 for found in spectra))
            for j in places
        },
    }


def _effective(found: Spectrum, square: float) -> float:
    S2 = found.S[found.S > 0].square()
    share = S2 / square
    entropy = -float((share * share.log()).sum())
    rest = found.rest**2 / square
    return math.exp(entropy - (rest * math.log(float(share[-1])) if rest else 0.0))


def _spaced(names: Sequence[str], most: int) -> list[str]:
    count = min(most, len(names))
    return [names[i * len(names) // count] for i in range(count)]


def _is_matrix(value: object) -> bool:
    return isinstance(value, LowRank) or (
        isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point() and value.numel() > 0
    )


def _compute(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
