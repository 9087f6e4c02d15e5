"""``B @ A`` and its algebra: the only QR and the only SVD of the project."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 5e-6
"""What a truncated solver may leave, relative to each approximation it serves: half of the 1e-5 that is promised."""

GUARD = 32
"""Triplets sought beyond those wanted: the gap behind them is what tells the wanted ones apart from the rest."""

SURE = 4
"""Blocks before an answer may count. Residuals bound what is wrong with the directions found and are silent on one not
met: where a warm start spans an invariant subspace they are tiny at once, and the noise beside it has met W only once.
"""

SMALL = 512
"""Up to this size a full SVD in float64 is a matter of milliseconds, and nothing else is worth its risk."""


def _compute(tensor: Tensor) -> Tensor:
    """At least float32: bf16 and fp16 are for storage."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class LowRank:
    """The matrix ``B @ A``, LoRA's scale already folded in.

    Args:
        B: ``(d_out, r)``.
        A: ``(r, d_in)``.

    Sums are exact: ranks add. Nothing here ever forms ``d_out x d_in`` unless that is cheaper than not to. bf16 and
    fp16 are for storage: whatever is computed from them comes out in float32.

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
        B, A = _factors(self)
        return B @ A

    def norm(self) -> float:
        """Frobenius norm, through QR: Gram matrices would lose half the digits, and can come out negative."""
        lean = _lean(self)
        if lean.rank == 0:
            return 0.0
        R_B = torch.linalg.qr(lean.B, mode="r").R
        R_A = torch.linalg.qr(lean.A.T, mode="r").R
        return float(torch.linalg.matrix_norm(R_B.double() @ R_A.double().T))

    def __add__(self, other: LowRank) -> LowRank:
        if not isinstance(other, LowRank):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(f"cannot add matrices of shape {self.shape} and {other.shape}.")
        B, A = torch.promote_types(self.B.dtype, other.B.dtype), torch.promote_types(self.A.dtype, other.A.dtype)
        return LowRank(torch.cat([self.B.to(B), other.B.to(B)], dim=1), torch.cat([self.A.to(A), other.A.to(A)], dim=0))

    def __neg__(self) -> LowRank:
        return LowRank(-self.B, self.A)

    def __sub__(self, other: LowRank) -> LowRank:
        return self + (-other)

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(_compute(self.B) * factor, self.A)

    __rmul__ = __mul__

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD ``U (d_out, m), S (m,) descending, Vh (m, d_in)``, ``m = min(r, d_out, d_in)``.

        By a thin QR of both factors and an SVD of the ``r x r`` core. Each left vector's largest entry is positive, so
        that a run is the same on every machine that has the same LAPACK.
        """
        dtype = _factors(self.leading(0))[0].dtype
        if self.rank > min(self.shape):
            return _signed(*_svd64(self.dense(), dtype))
        core, Q_B, Q_A = _core(self)
        U, S, Vh = _svd64(core, dtype)
        return _signed(Q_B @ U, S, Vh @ Q_A.T)

    def balanced(self) -> LowRank:
        """The same matrix as ``(U sqrt(S)) (sqrt(S) V^T)``, numerically null directions dropped.

        Columns come in the order of the singular values, so that ``leading(r)`` of it is ``truncate(r)``.
        """
        return _balanced(_lean(self))

    def leading(self, r: int) -> LowRank:
        """The first ``r`` columns of B and rows of A."""
        if r < 0:
            raise ValueError(f"a rank is 0 or more, got {r}.")
        return LowRank(self.B[:, :r], self.A[:r])

    def truncate(self, r: int) -> LowRank:
        """The best approximation of rank at most ``r`` in the Frobenius norm (Eckart and Young), balanced."""
        return self.balanced().leading(r)


def dominant(W: LowRank, share: float) -> LowRank:
    """The fewest leading columns of a balanced ``W`` that hold ``share`` of its squared norm; for 1, all of them."""
    energy = _terms(W).square().cumsum(0)  # (r,)
    if share >= 1 or not len(energy):
        return W
    return W.leading(int((energy < share * energy[-1]).sum()) + 1)


def _factors(matrix: LowRank) -> tuple[Tensor, Tensor]:
    """B and A in the one dtype that they are computed in."""
    B, A = _compute(matrix.B), _compute(matrix.A)
    dtype = torch.promote_types(B.dtype, A.dtype)
    return B.to(dtype), A.to(dtype)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in the matrix's own dtype, or by way of float64: gesdd fails to converge on some float32 matrices."""
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        return _svd64(matrix, matrix.dtype)


def _svd64(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD, computed in float64: a float32 one turns neighbouring vectors into each other by ``eps / gap``."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U.to(dtype), S.to(dtype), Vh.to(dtype)


def _core(matrix: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """``B A = Q_B core Q_A^T`` with orthonormal ``Q_B (d_out, .)`` and ``Q_A (d_in, .)``; the core is float64.

    Where columns repeat, the rows of *both* R are rounding there: their float64 product is rounding squared, far below
    any signal, while a float32 product would blur it.
    """
    B, A = _factors(matrix)
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    return R_B.double() @ R_A.double().T, Q_B, Q_A


def _lean(matrix: LowRank) -> LowRank:
    """The same matrix without zero columns, and with the columns merged that share a factor bit for bit.

    A returned update minus what was sent shares rows of A with the state it was cut from; merging them makes such a
    difference exact, and keeps the QR half as wide.
    """
    B, A = _factors(matrix)
    live = (_largest(B, 0) != 0) & (_largest(A, 1) != 0)
    if not bool(live.all()):
        B, A = B[:, live], A[live]
    A, columns = _merged(A, B.T)
    columns, A = _merged(columns, A)
    return LowRank(columns.T, A)


def _largest(X: Tensor, dim: int) -> Tensor:
    """The largest absolute value along ``dim``; 0 where that is empty."""
    return X.abs().amax(dim=dim) if X.numel() else X.new_zeros(X.shape[1 - dim])


def _merged(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``keys (r, n)`` that are equal become one; their rows of ``values (r, m)`` are added."""
    r, n = keys.shape
    if r < 2:
        return keys, values
    sample = keys[:, :: max(1, n // 32)]  # a few entries sort the rows, all of them decide
    groups, group = torch.unique(sample, dim=0, return_inverse=True)
    index = torch.arange(r, device=keys.device)
    first = torch.full((len(groups),), r, device=keys.device).scatter_reduce_(0, group, index, "amin")
    leader = first[group]
    follows = leader != index
    follows[follows.clone()] = (keys[follows] == keys[leader[follows]]).all(dim=1)
    if not bool(follows.any()):
        return keys, values
    total = values.clone().index_add_(0, leader[follows], values[follows])
    kept = ~follows & (_largest(total, 1) != 0)
    return keys[kept], total[kept]


def _scale(matrix: LowRank) -> float:
    """``sqrt(sum_j |b_j|^2 |a_j|^2)``: the size of the terms of the sum, however much of it cancels."""
    return float(_terms(matrix).norm())


def _terms(matrix: LowRank) -> Tensor:
    """``|b_j| |a_j|``, ``(r,)``, in float64: squares of large float32 numbers overflow in their own dtype."""
    b = torch.linalg.vector_norm(matrix.B, dim=0, dtype=torch.float64)
    return b * torch.linalg.vector_norm(matrix.A, dim=1, dtype=torch.float64)


def _signed(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if U.numel() == 0:
        return U, S, Vh
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))  # (1, m)
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, S, Vh * sign.T


def _balance(U: Tensor, S: Tensor, Vh: Tensor, scale: float) -> LowRank:
    """``(U sqrt(S)) (sqrt(S) Vh)`` without the directions that are rounding.

    All that is dropped has together a norm of at most 4 eps times ``scale``, the size of the terms that were added up:
    5e-7 of an update in float32. Rounding measures 1 to 3 eps there. Kept, it would be directions with two tiny
    factors, which hardly train; a bound per direction would add up to more than 1e-6 over hundreds of them.
    """
    rest = S.double().square().flip(0).cumsum(0).sqrt().flip(0)  # (m,): the norm of what lies from column j on
    m = int((rest > 4 * torch.finfo(S.dtype).eps * scale).sum())
    root = S[:m].sqrt()
    return LowRank(U[:, :m] * root, root[:, None] * Vh[:m])


def cheapest(W: LowRank | Tensor) -> LowRank | Tensor:
    """``W`` in the storage that takes fewer numbers: past rank ``d_out d_in / (d_out + d_in)`` the dense matrix."""
    if isinstance(W, LowRank) and W.rank * sum(W.shape) > W.shape[0] * W.shape[1]:
        return W.dense()
    return W


def plus(W: LowRank | Tensor, update: LowRank) -> LowRank | Tensor:
    """``W + update``, exact; dense stays dense, in float32 or better."""
    if isinstance(W, LowRank):
        return W + update if W.rank else update
    W, lean = _compute(W), _lean(update)
    return torch.addmm(W, lean.B.to(W.dtype), lean.A.to(W.dtype))


def as_lowrank(W: LowRank | Tensor) -> LowRank:
    """``W`` as a product: a dense ``D`` is ``D @ I`` or ``I @ D``, whichever is smaller."""
    if isinstance(W, LowRank):
        return W
    d_out, d_in = W.shape
    eye = torch.eye(min(d_out, d_in), dtype=W.dtype, device=W.device)
    return LowRank(W, eye) if d_in <= d_out else LowRank(eye, W)


@dataclass(frozen=True)
class Settled:
    """An update as the server keeps it.

    Args:
        W: in its cheapest storage; where that is a product, the columns of B are orthogonal, which ``absorb`` needs.
        top: its best approximation of the rank that was asked for, balanced, so that its first ``r'`` columns and rows
            are the best of every smaller rank.
        rest: ``|| W - top ||_F``.
    """

    W: LowRank | Tensor
    top: LowRank
    rest: float

    def tails(self, r: int) -> Tensor:
        """``|| W - W^(j) ||_F`` for ``j = 0 ... r``, r at most the rank that was asked for: ``(r + 1,)``, float64."""
        squares = torch.zeros(max(r, self.top.rank) + 1, dtype=torch.float64)
        squares[: self.top.rank] = _terms(self.top).square()
        return (squares.flip(0).cumsum(0).flip(0) + self.rest**2).sqrt()[: r + 1]


def settle(W: LowRank | Tensor, r: int, start: LowRank | None = None) -> Settled:
    """``W`` in its cheapest storage, with its best approximation of rank ``r``.

    Args:
        start: the approximation of the round before: a warm start where no full SVD is taken.
    """
    if isinstance(W, LowRank):
        W = cheapest(_lean(W))
    if isinstance(W, Tensor):
        W = _compute(W)
        top = _balance(*_leading_svd(W, r, start), scale=_frobenius(W))
        return Settled(W, top, _rest(W, top))
    if not _is_small(W.rank, r):
        Q, R = torch.linalg.qr(W.B)
        return _parted(LowRank(Q, R @ W.A), r, start, _scale(W))
    W = _balanced(W)
    return Settled(W, W.leading(r), float(_terms(W)[r:].norm()))


def absorb(W: LowRank | Tensor, update: LowRank, r: int, start: LowRank | None = None) -> Settled:
    """``settle(W + update, r, start)`` for a ``W`` that is settled: its columns stay, and a round costs what it adds.

    Only what ``update`` has beyond those columns is made orthogonal: ``W + B A = [Q, P] ([Q^T W; 0] + [Q, P]^T B A)``,
    with ``Q`` the columns of W at length 1 and ``P`` a basis of what ``B`` brings.
    """
    if isinstance(W, Tensor) or _is_small(W.rank, r):
        return settle(plus(W, update), r, start)
    length = torch.linalg.vector_norm(W.B, dim=0, dtype=torch.float64).to(W.B.dtype)
    Q, A, update = W.B / length, length[:, None] * W.A, _lean(update)
    B = update.B.to(Q.dtype)
    beyond = LowRank(B - Q @ (Q.T @ B), update.A)
    Q = torch.cat([Q, _orthonormal(_balance(*beyond.svd(), scale=_scale(update)).B, Q)], dim=1)
    rows = (Q.T @ B) @ update.A.to(Q.dtype)
    rows[: len(A)] += A
    W = cheapest(LowRank(Q, rows))
    return settle(W, r, start) if isinstance(W, Tensor) else _parted(W, r, start, _scale(W))


def truncate_dense(W: Tensor, r: int, generator: torch.Generator | None = None) -> LowRank:
    """A dense ``W (d_out, d_in)`` as ``U_r sqrt(S_r)`` and ``sqrt(S_r) V_r^T``, with ``min(r, d_out, d_in)`` columns.

    One full SVD, and the only one for every smaller rank: the first ``r'`` columns and rows are the best approximation
    of rank ``r'``. Directions that W has not (singular values that are rounding) get a zero column in B and in A a
    fresh row from the generator, as in ``fill``, or zeros without one. No value decides what is computed, so that meta
    tensors give the shapes.
    """
    U, S, Vh = _svd(_compute(W))
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    rounding = S[:1] * max(W.shape) * torch.finfo(S.dtype).eps
    fresh = torch.zeros(len(S), W.shape[1])
    if generator is not None:
        fresh = (torch.rand(len(S), W.shape[1], generator=generator) * 2 - 1) * W.shape[1] ** -0.5
    root, live = S.sqrt(), (S - rounding).clamp(min=0).bool()
    B, A = torch.where(live, U * root, 0.0), torch.where(live[:, None], root[:, None] * Vh, fresh.to(S))
    return LowRank(B.to(W.dtype), A.to(W.dtype))


def _is_small(n: int, r: int) -> bool:
    """Whether all ``n`` singular triplets cost no more than the Krylov blocks that would find ``r`` of them."""
    return n <= max(SMALL, 8 * (r + GUARD))


def _parted(W: LowRank, r: int, start: LowRank | None, scale: float) -> Settled:
    """Of ``W = Q A`` with orthonormal ``Q``: the triplets of A are W's, left vectors in the coordinates of Q."""
    Q, A = W.B, W.A
    U, S, Vh = _leading_svd(A, r, start)
    top = _balance(*_signed(Q @ U, S, Vh), scale=scale)
    if top.rank < r:  # all that is left is rounding
        return Settled(top, top, 0.0)
    return Settled(W, top, _frobenius(torch.addmm(A, U * S, Vh, alpha=-1)))


def _balanced(lean: LowRank) -> LowRank:
    return _balance(*lean.svd(), scale=_scale(lean))


def _rest(W: Tensor, top: LowRank) -> float:
    """``|| W - top ||_F`` of a dense W."""
    whole = _frobenius(W) ** 2
    rest = whole - float(_terms(top).square().sum())
    if rest < 0.01 * whole:  # a difference of nearly equal squares: take the norm of the difference instead
        return _frobenius(W - top.dense().to(W.device))
    return rest**0.5


def _leading_svd(W: Tensor, r: int, start: LowRank | None) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``r`` singular triplets of a dense ``W (d, k)``: ``U (d, r), S (r,), Vh (r, k)``, in its dtype.

    Block Golub-Kahan-Lanczos, warm-started, in the dtype of ``W``, then in float64; an answer counts once its residuals
    in float64 bound the error of each approximation it serves by ``TOLERANCE``. A spectrum too flat for that, or a
    cluster at the cut, gets the full SVD.
    """
    r = min(r, *W.shape)
    block = r + GUARD
    if _is_small(min(W.shape), r):
        U, S, Vh = _svd64(W, W.dtype)
        return _signed(U[:, :r], S[:r], Vh[:r])
    V = _warm(W, block, start)
    for _ in range(3):
        V, estimate = _krylov(W, V, r)
        if estimate <= TOLERANCE:
            break
    U, S, V, error = _ritz(W, V, r)
    if TOLERANCE < error < 0.1:  # float32 has come as far as its rounding lets it
        V, _ = _krylov(W.double(), V, r)
        U, S, V, error = _ritz(W, V, r)
    if error > TOLERANCE:
        U, S, V, _ = _ritz(W, _svd(W)[2][:block].T, r)
    return _signed(U[:, :r].to(W.dtype), S[:r].to(W.dtype), V[:, :r].T.to(W.dtype))


def _warm(W: Tensor, block: int, start: LowRank | None) -> Tensor:
    """``(k, block)``: the right vectors of ``start``, then seeded noise, without which a new direction could hide."""
    known = W.new_zeros(0, W.shape[1]) if start is None else start.A[: block - GUARD].to(W)
    noise = torch.randn(block - len(known), W.shape[1], generator=torch.Generator().manual_seed(0)).to(W)
    return torch.cat([torch.nn.functional.normalize(known), torch.nn.functional.normalize(noise)]).T


def _krylov(W: Tensor, V: Tensor, r: int, steps: int = 10) -> tuple[Tensor, float]:
    """Right Ritz vectors ``(k, block)`` of ``W`` in ``span{V, W^T W V, (W^T W)^2 V, ...}``, in the dtype of ``W``.

    Stops where the leading ``r`` are good, where rounding ends their progress, or after ``steps`` blocks. The second
    value is an estimate of their error; 0 where more steps would not lower it.
    """
    block, eps = V.shape[1], torch.finfo(W.dtype).eps
    right = torch.linalg.qr(V).Q  # (k, m), m = step * block
    left, images = W.new_zeros(W.shape[0], 0), W.new_zeros(W.shape[1], 0)  # U (d, m) and W^T U (k, m)
    steps = min(steps, min(W.shape) // block)
    for step in range(1, steps + 1):
        U = _orthonormal(W @ right[:, -block:], left)
        Z = W.T @ U
        left, images = torch.cat([left, U], dim=1), torch.cat([images, Z], dim=1)
        Y, S, Xh = torch.linalg.svd(images.T @ right)  # U^T W V, (m, m)
        beyond = Z - right @ (right.T @ Z)
        residual = (torch.linalg.qr(beyond, mode="r").R @ Y[-block:, :block]).norm(dim=0)
        estimate = 0.0 if bool((residual[:r] <= 4 * eps * S[0]).all()) else _error(S[:block], residual, r)
        if step == steps or (step >= SURE and estimate <= TOLERANCE / 5):
            break
        right = torch.cat([right, _orthonormal(beyond, right)], dim=1)
    return right @ Xh[:block].T, estimate


def _orthonormal(X: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of ``X`` beyond ``basis``. Twice: columns that vanish the first time leave only rounding."""
    for _ in range(2):
        X = torch.linalg.qr(X - basis @ (basis.T @ X)).Q
    return X


def _ritz(W: Tensor, V: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Singular triplets of ``W`` in ``span V (k, block)`` and the error they come with, all of it in float64."""
    W = W.double()
    V = torch.linalg.qr(V.double()).Q
    U = torch.linalg.qr(W @ V).Q
    Z = W.T @ U  # (k, block)
    Y, S, _ = torch.linalg.svd(Z.T @ V)
    residual = ((Z - V @ (V.T @ Z)) @ Y).norm(dim=0)
    error = _error(S, residual, r)
    V, S, Yh = torch.linalg.svd(Z, full_matrices=False)  # half a step further, for nothing: W^T (U Y) = V S
    return U @ Yh.T, S, V, error


def _error(S: Tensor, residual: Tensor, r: int) -> float:
    """The largest ``|| W'^(j) - W^(j) || / || W^(j) ||`` there can be over ``j = 1 ... r``; Ritz values ``S (block,)``.

    Vector ``i`` is off by the angle ``residual_i / (s_i - s_out)`` (Davis and Kahan; Wedin), where ``s_out``, the
    largest singular value outside the block, is taken to be at most the last Ritz value and the largest residual of
    those beyond ``r`` (a direction not yet found shows up there, once the noise has met W ``SURE`` times); that moves
    ``W^(j)`` by ``sqrt(2) s_i`` times the angle, and a wrong direction costs at most ``sqrt(2) (s_i + residual_i)``.
    """
    S, residual = S.double(), residual.double()
    gap = S[:r] - (S[-1] + residual[r:].max())
    off = torch.where(gap > 0, S[:r] * residual[:r] / gap.clamp(min=torch.finfo(gap.dtype).tiny), torch.inf)
    off = 2**0.5 * torch.minimum(off, S[:r] + residual[:r])
    kept = S[:r].square().cumsum(0)
    return float((off.square().cumsum(0) / kept.clamp(min=torch.finfo(gap.dtype).tiny)).sqrt().max()) if r else 0.0


def _frobenius(W: Tensor) -> float:
    return float(torch.linalg.vector_norm(W, dtype=torch.float64))


def smallest(W: Tensor) -> float:
    """The smallest singular value of a matrix that is not empty.

    Through the Gram matrix, several times cheaper than an SVD: in float64 what that loses is 1.5e-8 of the largest
    singular value, less than the rounding of float32 entries moves it.
    """
    W = (W if W.shape[0] >= W.shape[1] else W.T).double()
    return float(torch.linalg.eigvalsh(W.T @ W)[0].clamp(min=0).sqrt())


def nearest_rotation(M: Tensor) -> Tensor:
    """The rotation ``R (r, r)`` that maximises ``tr(R^T M)``: ``U diag(1, ..., 1, det(U V^T)) V^T``, no reflection.

    Directions that M has not are left alone, which is what a thousandth of a thousandth of the identity decides.
    """
    U, _, Vh = _svd(M + 1e-6 * torch.linalg.matrix_norm(M) * torch.eye(len(M)).to(M))
    U[:, -1] *= torch.linalg.det(U @ Vh).sign()
    return U @ Vh


def fill(W: LowRank, r: int, generator: torch.Generator) -> LowRank:
    """``W`` as factors of rank exactly ``r``: surplus directions get a zero column in B and a fresh row in A.

    The product does not change, and the new directions can train: zeros in both factors would have a zero gradient.
    Row ``j`` is row ``j`` of one seeded matrix, drawn as PEFT draws A, so that clients of different rank get nested
    rows.

    Raises:
        ValueError: where ``r`` is below the rank of ``W``.
    """
    d_out, d_in = W.shape
    if r < W.rank:
        raise ValueError(f"a product of rank {W.rank} does not fit into rank {r}: truncate it first.")
    B, A = _factors(W)
    if r == W.rank:
        return LowRank(B, A)
    bound = d_in**-0.5  # Kaiming uniform with a = sqrt(5), as torch.nn.Linear and PEFT draw it
    rows = (torch.rand(r, d_in, generator=generator) * 2 - 1) * bound  # filled row by row: the first r' rows are nested
    return LowRank(torch.cat([B, B.new_zeros(d_out, r - W.rank)], dim=1), torch.cat([A, rows[W.rank :].to(A)]))
