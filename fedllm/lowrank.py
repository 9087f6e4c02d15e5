"""``B @ A`` and its algebra: the only QR and the only SVD of the project."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _compute(tensor: Tensor) -> Tensor:
    """At least float32: bf16 and fp16 are for storage."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class LowRank:
    """The matrix ``B @ A``, LoRA's scale already folded in.

    Args:
        B: ``(d_out, r)``.
        A: ``(r, d_in)``.

    Sums are exact: ranks add. Nothing here ever forms ``d_out x d_in`` unless that is cheaper than not to.

    Raises:
        ValueError: where the factors do not fit each other.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"B must be (d_out, r) and A (r, d_in) with one r, got {tuple(self.B.shape)} and {tuple(self.A.shape)}."
            )

    @staticmethod
    def zeros(d_out: int, d_in: int, dtype: torch.dtype = torch.float32) -> LowRank:
        """The zero matrix, as a product of rank 0."""
        return LowRank(torch.zeros(d_out, 0, dtype=dtype), torch.zeros(0, d_in, dtype=dtype))

    @property
    def rank(self) -> int:
        """The number of columns of B: an upper bound of the matrix's rank."""
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.B.shape[0], self.A.shape[1])

    def dense(self) -> Tensor:
        """``(d_out, d_in)``."""
        return _compute(self.B) @ _compute(self.A)

    def norm(self) -> float:
        """Frobenius norm, through QR: Gram matrices would lose half the digits, and can come out negative."""
        return float(torch.linalg.matrix_norm(_core(self)[0].double()))

    def __add__(self, other: LowRank) -> LowRank:
        if not isinstance(other, LowRank):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(f"cannot add matrices of shape {self.shape} and {other.shape}.")
        dtype = torch.promote_types(self.B.dtype, other.B.dtype)
        return LowRank(
            torch.cat([self.B.to(dtype), other.B.to(dtype)], dim=1), torch.cat([self.A.to(dtype), other.A.to(dtype)], dim=0)
        )

    def __neg__(self) -> LowRank:
        return LowRank(-self.B, self.A)

    def __sub__(self, other: LowRank) -> LowRank:
        return self + (-other)

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.B * factor, self.A)

    __rmul__ = __mul__

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD ``U (d_out, m), S (m,) descending, Vh (m, d_in)``, ``m = min(r, d_out, d_in)``.

        By a thin QR of both factors and an SVD of the ``r x r`` core. Each left vector's largest entry is positive, so
        that a run is the same on every machine that has the same LAPACK.
        """
        if self.rank > min(self.shape):
            return _signed(*torch.linalg.svd(self.dense(), full_matrices=False))
        core, Q_B, Q_A = _core(self)
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        return _signed(Q_B @ U, S, Vh @ Q_A.T)

    def balanced(self) -> LowRank:
        """The same matrix as ``(U sqrt(S)) (sqrt(S) V^T)``, numerically null directions dropped.

        Columns come in the order of the singular values, so that ``leading(r)`` of it is ``truncate(r)``.
        """
        return _balance(*self.svd())

    def leading(self, r: int) -> LowRank:
        """The first ``r`` columns of B and rows of A."""
        return LowRank(self.B[:, :r], self.A[:r])

    def truncate(self, r: int) -> LowRank:
        """The best approximation of rank at most ``r`` in the Frobenius norm (Eckart and Young), balanced."""
        if r < 0:
            raise ValueError(f"a rank is 0 or more, got {r}.")
        return self.balanced().leading(r)


def _core(matrix: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """``B A = Q_B core Q_A^T`` with orthonormal ``Q_B (d_out, .)`` and ``Q_A (d_in, .)``."""
    Q_B, R_B = torch.linalg.qr(_compute(matrix.B))
    Q_A, R_A = torch.linalg.qr(_compute(matrix.A).T)
    return R_B @ R_A.T, Q_B, Q_A


def _signed(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if S.numel() == 0:
        return U, S, Vh
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))  # (1, m)
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, S, Vh * sign.T


def _balance(U: Tensor, S: Tensor, Vh: Tensor) -> LowRank:
    null = S[0] * 4 * torch.finfo(S.dtype).eps if S.numel() else 0.0  # rounding of the QR and SVD, not signal
    m = int((S > null).sum())
    root = S[:m].sqrt()
    return LowRank(U[:, :m] * root, root[:, None] * Vh[:m])


def cheapest(W: LowRank | Tensor) -> LowRank | Tensor:
    """``W`` in the storage that takes fewer numbers: past rank ``d_out d_in / (d_out + d_in)`` that is the dense matrix."""
    if isinstance(W, LowRank) and W.rank * sum(W.shape) > W.shape[0] * W.shape[1]:
        return W.dense()
    return W


def plus(W: LowRank | Tensor, update: LowRank) -> LowRank | Tensor:
    """``W + update``, exact; dense stays dense."""
    if isinstance(W, LowRank):
        return W + update
    return torch.addmm(W, update.B.to(W.dtype), update.A.to(W.dtype))


def as_lowrank(W: LowRank | Tensor) -> LowRank:
    """``W`` as a product: a dense ``D`` is ``D @ I`` or ``I @ D``, whichever is smaller."""
    if isinstance(W, LowRank):
        return W
    d_out, d_in = W.shape
    eye = torch.eye(min(d_out, d_in), dtype=W.dtype, device=W.device)
    return LowRank(W, eye) if d_in <= d_out else LowRank(eye, W)


def settle(W: LowRank | Tensor, r: int, start: LowRank | None = None) -> tuple[LowRank | Tensor, LowRank]:
    """``W`` in its cheapest storage, balanced if that is a product, and its best approximation of rank ``r``.

    Args:
        start: the approximation of the round before, a warm start where ``W`` is dense.
    """
    W = cheapest(W)
    if isinstance(W, LowRank):
        W = W.balanced()
        return W, W.leading(r)
    return W, _balance(*_signed(*torch.linalg.svd(_compute(W), full_matrices=False))).leading(r)


def tail(W: LowRank | Tensor, top: LowRank, r: int) -> float:
    """``|| W - W^(r) ||_F`` for a ``W, top`` that ``settle`` returned and any ``r`` up to ``top.rank``."""
    if isinstance(W, LowRank):  # balanced: the j-th singular value is |b_j| |a_j|
        return float((W.B[:, r:].double().norm(dim=0) * W.A[r:].double().norm(dim=1)).norm())
    kept = (top.B[:, :r].double().norm(dim=0) * top.A[:r].double().norm(dim=1)).square().sum()
    return float((W.double().square().sum() - kept).clamp(min=0).sqrt())


def fill(W: LowRank, r: int, generator: torch.Generator) -> LowRank:
    """``W`` as factors of rank exactly ``r``: surplus directions get a zero column in B and a fresh row in A.

    The product does not change, and the new directions can train: zeros in both factors would have a zero gradient.
    Row ``j`` is row ``j`` of one seeded matrix, drawn as PEFT draws A, so that clients of different rank get nested rows.

    Raises:
        ValueError: where ``r`` is below the rank of ``W``.
    """
    d_out, d_in = W.shape
    if r < W.rank:
        raise ValueError(f"a product of rank {W.rank} does not fit into rank {r}: truncate it first.")
    bound = d_in**-0.5  # Kaiming uniform with a = sqrt(5), as torch.nn.Linear and PEFT draw it
    rows = (torch.rand(r, d_in, generator=generator) * 2 - 1) * bound  # filled row by row: the first r' rows are nested
    A = torch.cat([_compute(W.A), rows[W.rank :].to(W.A)])
    B = torch.cat([_compute(W.B), torch.zeros(d_out, r - W.rank).to(W.B)], dim=1)
    return LowRank(B, A)
