"""Low-rank algebra: sums, truncation, norms, the truncated solver of dense updates, and FedHL's life on top of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fedllm.lowrank as lowrank
from fedllm.algorithms import FedHL
from fedllm.core import Client, Model, Reply, Round
from fedllm.lowrank import LowRank, absorb, as_lowrank, cheapest, fill, plus, settle, smallest
from fedllm.mean import mean_products

quick = settings(max_examples=40, deadline=None)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**20)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (1, 7), (5, 5)])
@pytest.mark.parametrize("least", [0.5, 1.3e-3, 1e-6])
def test_the_smallest_singular_value_is_found_beside_a_large_one(shape: tuple[int, int], least: float) -> None:
    """Known ones from 10 down to the least; 1e-7 of the largest is float32's own rounding."""
    m = min(shape)
    S = torch.logspace(1, math.log10(least), m, dtype=torch.float64) if m > 1 else torch.tensor([least]).double()
    U, V = (torch.linalg.qr(torch.randn(n, m, generator=seeded(n)).double()).Q for n in shape)
    assert smallest(U * S @ V.T) == pytest.approx(least, rel=1e-2, abs=1e-7)


def random(shape: tuple[int, int], r: int, seed: int, dtype: torch.dtype = torch.float32) -> LowRank:
    generator = seeded(seed)
    B, A = torch.randn(shape[0], r, generator=generator), torch.randn(r, shape[1], generator=generator)
    return LowRank(B.to(dtype), A.to(dtype))


def wide(M: LowRank | Tensor) -> Tensor:
    """The matrix in float64, product and all."""
    return M.B.double() @ M.A.double() if isinstance(M, LowRank) else M.double()


def best(M: Tensor, r: int) -> Tensor:
    """The best approximation of rank r, in float64 by the full SVD."""
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def with_spectrum(S: Tensor, d: int, k: int, seed: int = 0) -> Tensor:
    """A dense float32 (d, k) with these singular values."""
    generator = seeded(seed)
    U = torch.linalg.qr(torch.randn(d, len(S), generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(k, len(S), generator=generator, dtype=torch.float64)).Q
    return ((U * S) @ V.T).float()


# --- hand numbers -------------------------------------------------------------------------------------------------


def test_two_by_two() -> None:
    """M = [[3, 0], [4, 5]]: M^T M = [[25, 20], [20, 25]] has eigenvalues 45 and 5, so s = sqrt 45, sqrt 5.

    v_1 = (1, 1) / sqrt 2, so the best rank 1 is M v_1 v_1^T = [[1.5, 1.5], [4.5, 4.5]]; what it misses has norm sqrt 5,
    and all of M has norm sqrt(9 + 16 + 25) = sqrt 50.
    """
    M = LowRank(torch.tensor([[3.0, 0.0], [4.0, 5.0]]), torch.eye(2))
    _, S, _ = M.svd()
    torch.testing.assert_close(S, torch.tensor([math.sqrt(45), math.sqrt(5)]))
    torch.testing.assert_close(M.truncate(1).dense(), torch.tensor([[1.5, 1.5], [4.5, 4.5]]))
    assert M.norm() == pytest.approx(math.sqrt(50))
    assert settle(M, 2).tails(2).tolist() == pytest.approx([math.sqrt(50), math.sqrt(5), 0.0], abs=1e-6)


def test_balanced_split_and_sign() -> None:
    """M = [[0, -8], [2, 0]]: s = 8, 2; u_1 = e_1 with its largest entry positive, so v_1 = -e_2; u_2 = e_2, v_2 = e_1.

    B = U sqrt S = [[sqrt 8, 0], [0, sqrt 2]], A = sqrt S V^T = [[0, -sqrt 8], [sqrt 2, 0]].
    """
    M = as_lowrank(torch.tensor([[0.0, -8.0], [2.0, 0.0]])).balanced()
    torch.testing.assert_close(M.B, torch.tensor([[8**0.5, 0.0], [0.0, 2**0.5]]))
    torch.testing.assert_close(M.A, torch.tensor([[0.0, -(8**0.5)], [2**0.5, 0.0]]))


def test_storage_switches_where_dense_is_smaller() -> None:
    """4 x 12 holds 48 numbers and a rank 16 each: rank 3 is as large (kept), rank 4 larger (dense)."""
    assert isinstance(cheapest(random((4, 12), 3, 0)), LowRank)
    assert isinstance(cheapest(random((4, 12), 4, 0)), Tensor)


# --- laws over shapes, ranks, dtypes ------------------------------------------------------------------------------


@quick
@given(SHAPES, st.integers(0, 15), st.integers(0, 15), DTYPES, SEEDS, st.floats(-3, 3, width=32))
def test_sums_are_exact(shape, r, other, dtype, seed, factor) -> None:
    X, Y = random(shape, r, seed, dtype), random(shape, other, seed + 1, dtype)
    total = X + factor * Y - X * 0.5
    truth = 0.5 * wide(X) + factor * wide(Y)
    assert total.rank == 2 * r + other
    torch.testing.assert_close(wide(total), truth, rtol=0, atol=2e-6 * (1 + wide(X).norm() + 3 * wide(Y).norm()))


@quick
@given(SHAPES, st.integers(0, 15), st.integers(0, 6), DTYPES, SEEDS)
def test_truncation_is_the_best(shape, r, kept, dtype, seed) -> None:
    M = random(shape, r, seed, dtype)
    got, truth = M.truncate(kept), wide(M)
    S = torch.linalg.svdvals(truth)
    assert got.rank <= min(kept, r, *shape)
    assert got.B.dtype == torch.promote_types(dtype, torch.float32)
    assert float((truth - wide(got)).norm()) == pytest.approx(float(S[kept:].norm()), abs=2e-6 * float(truth.norm()))
    assert M.norm() == pytest.approx(float(truth.norm()), rel=2e-6)


@quick
@given(SHAPES, st.integers(1, 15), SEEDS)
def test_svd_and_balance(shape, r, seed) -> None:
    M = random(shape, r, seed)
    U, S, Vh = M.svd()
    m = min(r, *shape)
    assert (U.shape, S.shape, Vh.shape) == ((shape[0], m), (m,), (m, shape[1]))
    torch.testing.assert_close(wide(M), wide(LowRank(U * S, Vh)), rtol=0, atol=2e-6 * M.norm())
    even = M.balanced()
    rank = even.rank
    torch.testing.assert_close(even.B.T @ even.B, torch.diag(S[:rank]), rtol=0, atol=2e-6 * float(S[0]))
    torch.testing.assert_close(even.A @ even.A.T, torch.diag(S[:rank]), rtol=0, atol=2e-6 * float(S[0]))
    assert bool((U.gather(0, U.abs().argmax(dim=0, keepdim=True)) > 0).all())
    again = even.truncate(2)
    torch.testing.assert_close(wide(again), wide(even.leading(2)), rtol=0, atol=4e-6 * M.norm())


@quick
@given(st.integers(1, 6), st.lists(st.floats(0.125, 2, width=32), min_size=2, max_size=5), SEEDS)
def test_repeated_directions_leave_no_rounding_behind(r, factors, seed) -> None:
    """The same matrix, written with other factors each time: the sum has rank r, not rank r and noise."""
    M = random((40, 30), r, seed)
    turn = torch.linalg.qr(torch.randn(r, r, generator=seeded(seed))).Q
    same = [LowRank(M.B @ turn * f, turn.T @ M.A) for f in factors]
    total = mean_products([M, *same], [1.0] * (1 + len(same)))
    assert total.balanced().rank == r
    truth = (1 + sum(factors)) * wide(M)
    torch.testing.assert_close(wide(total.balanced()), truth, rtol=0, atol=2e-6 * float(truth.norm()))


@quick
@given(SHAPES, st.integers(1, 15), st.integers(0, 4), DTYPES, SEEDS)
def test_what_cancels_is_gone(shape, r, more, dtype, seed) -> None:
    X, Y = random(shape, r, seed, dtype), random(shape, more, seed + 1, dtype) * 1e-4
    assert (X - X).norm() == 0.0 and (X - X).balanced().rank == 0
    left = X + Y - X
    assert left.norm() == pytest.approx(float(wide(Y).norm()), rel=1e-6)
    torch.testing.assert_close(wide(left.balanced()), wide(Y), rtol=0, atol=2e-6 * float(wide(Y).norm()))


@quick
@given(SHAPES, st.permutations(range(5)), SEEDS)
def test_the_order_of_terms_does_not_matter(shape, order, seed) -> None:
    terms = [random(shape, r, seed + r) for r in (4, 1, 0, 2, 7)]
    weights = [0.1, 0.2, 0.3, 0.25, 0.15]
    one = mean_products(terms, weights)
    other = mean_products([terms[i] for i in order], [weights[i] for i in order])
    size = sum(weight * float(wide(term).norm()) for term, weight in zip(terms, weights, strict=True))
    torch.testing.assert_close(wide(one.balanced()), wide(other.balanced()), rtol=0, atol=2e-6 * size)
    assert one.norm() == pytest.approx(other.norm(), abs=2e-6 * size)


@quick
@given(SHAPES, st.integers(0, 15), st.integers(0, 5), SEEDS, st.booleans())
def test_settled_updates_know_their_tails(shape, r, served, seed, dense) -> None:
    M = random(shape, r, seed)
    found = settle(M.dense() if dense else M, served)
    W, top = found.W, found.top
    S = torch.linalg.svdvals(wide(M))
    size = float(S.norm())
    torch.testing.assert_close(wide(W), wide(M), rtol=0, atol=2e-6 * size)
    assert top.rank <= served
    ranks = list(range(served + 1))
    assert found.tails(served).tolist() == pytest.approx([float(S[q:].norm()) for q in ranks], abs=2e-6 * size)
    for q in ranks:
        assert float((wide(M) - wide(top.leading(q))).norm()) == pytest.approx(float(S[q:].norm()), abs=2e-6 * size)


def test_zero_has_no_directions() -> None:
    for M in (
        LowRank.zeros(5, 7),
        LowRank(torch.zeros(5, 3), torch.ones(3, 7)),
        LowRank(torch.ones(5, 3), torch.zeros(3, 7)),
    ):
        assert M.norm() == 0.0 and M.balanced().rank == 0 and M.truncate(2).shape == (5, 7)
        found = settle(M, 4)
        assert found.top.rank == 0 and found.tails(4).tolist() == [0.0] * 5
    found = settle(torch.zeros(600, 610), 4)
    assert found.top.rank == 0 and found.top.shape == (600, 610) and found.tails(4).tolist() == [0.0] * 5


def test_a_faint_direction_is_signal() -> None:
    """1e-5 of the largest is far above rounding, and 200 such directions are 1.4e-4 of the whole: none may go."""
    S = torch.cat([torch.ones(1), torch.full((200,), 1e-5)]).double()
    generator = seeded(3)
    U = torch.linalg.qr(torch.randn(400, 201, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(300, 201, generator=generator, dtype=torch.float64)).Q
    M = LowRank((U * S).float(), V.T.float())
    assert M.balanced().rank == 201
    assert float((wide(M.balanced()) - wide(M)).norm()) < 1e-6 * M.norm()


@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e25])
def test_scale_does_not_matter(scale: float) -> None:
    M = random((20, 30), 4, 0)
    assert (M * scale).balanced().rank == 4
    assert (M * scale).norm() == pytest.approx(scale * M.norm(), rel=1e-6)
    lopsided = LowRank(M.B * scale, M.A / scale)
    torch.testing.assert_close(wide(lopsided.truncate(2)), best(wide(M), 2), rtol=0, atol=2e-6 * M.norm())


def test_float64_keeps_its_digits() -> None:
    M = LowRank(random((30, 20), 6, 0).B.double(), random((30, 20), 6, 0).A.double())
    torch.testing.assert_close(M.truncate(3).dense(), best(wide(M), 3), rtol=0, atol=1e-13 * M.norm())


@quick
@given(SHAPES, st.integers(0, 3), st.integers(0, 6), SEEDS)
def test_fill_changes_nothing_and_leaves_room_to_train(shape, r, more, seed) -> None:
    M = random(shape, r, seed)
    full = fill(M, r + more, seeded(seed))
    assert full.rank == r + more
    torch.testing.assert_close(full.dense(), M.dense())
    assert not full.B[:, r:].any() and bool(full.A[r:].any(dim=1).all())
    torch.testing.assert_close(fill(M, r + more + 2, seeded(seed)).A[: r + more], full.A, rtol=0, atol=0)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        LowRank(torch.zeros(3, 2), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="shape"):
        LowRank.zeros(3, 4) + LowRank.zeros(4, 3)
    with pytest.raises(ValueError, match="-1"):
        LowRank.zeros(3, 4).truncate(-1)
    with pytest.raises(ValueError, match="truncate"):
        fill(random((5, 5), 3, 0), 2, seeded(0))


# --- the truncated solver -----------------------------------------------------------------------------------------

N = 600
STEPS = torch.arange(1, N + 1).double()
SPECTRA = {
    "1/j": 1 / STEPS,
    "exponential": torch.logspace(0, -6, N).double(),
    "flat": 1 - STEPS / (3 * N),
    "rank below r": torch.cat([torch.linspace(2, 1, 9), torch.zeros(N - 9)]).double(),
    "rank just above r": torch.cat([torch.linspace(2, 1, 18), torch.zeros(N - 18)]).double(),
    "one giant": torch.cat([torch.tensor([1e4]), torch.linspace(2, 1, N - 1)]).double(),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_dense_top_is_the_full_svd_s(spectrum: str, device: str) -> None:
    W = with_spectrum(SPECTRA[spectrum], N, N + 20).to(device)
    found = settle(W, 16)
    for r in (1, 2, 4, 8, 16):
        truth = best(W, r)
        assert float((wide(found.top.leading(r)) - truth).norm()) < 1e-5 * float(truth.norm()), r
    S = torch.linalg.svdvals(W.double())
    expected = [float(S[r:].norm()) for r in range(17)]
    assert found.tails(16).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6 * float(S.norm()))


@pytest.mark.parametrize(
    "spectrum", [torch.ones(N).double(), torch.cat([torch.ones(40), torch.full((N - 40,), 0.5)]).double()]
)
def test_no_gap_at_the_cut(spectrum: Tensor) -> None:
    """The best approximation is not unique: any of them will do, as long as it misses no more than it must."""
    W = with_spectrum(spectrum, N, N)
    found = settle(W, 16)
    missed = float((W.double() - wide(found.top)).norm())
    assert missed == pytest.approx(float(spectrum[16:].norm()), rel=1e-6)
    assert float(found.tails(16)[16]) == pytest.approx(missed, rel=1e-6)


def test_a_start_cannot_change_the_answer() -> None:
    """Also not one that spans the old directions exactly while a larger one, orthogonal to all of them, is new."""
    old = with_spectrum(SPECTRA["1/j"][:300], N, N)
    top = settle(old, 16).top
    U, _, Vh = torch.linalg.svd(old.double())
    hidden = (2 * torch.outer(U[:, 400], Vh[400])).float()  # in the null space of the old update, both sides
    for start in (None, top, random((N, N), 16, 1), LowRank.zeros(N, N)):
        new = settle(old + hidden, 16, start).top
        truth = best(old + hidden, 16)
        assert float((wide(new) - truth).norm()) < 1e-5 * float(truth.norm())


def test_a_wrong_subspace_is_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that returns what it was given: the residual tells, and the full SVD answers."""
    W = with_spectrum(SPECTRA["1/j"], N, N)
    monkeypatch.setattr(lowrank, "_krylov", lambda W, V, r, steps=10: (V, 0.0))
    top = settle(W, 16).top
    truth = best(W, 16)
    assert float((wide(top) - truth).norm()) < 1e-5 * float(truth.norm())


@pytest.mark.parametrize("hidden", [1, 31, 33, 64, 128])
@pytest.mark.parametrize("rest", [0.1, 0.8])
def test_a_start_that_is_an_invariant_subspace_hides_nothing(hidden: int, rest: float) -> None:
    """The old top 16, known to the last digit, beside new directions of which two are larger than its smallest ones.

    The residuals of what the start spans are rounding from the first product on.
    """
    old, new = torch.linspace(1.3, 1, 16), torch.linspace(rest, 0.05, hidden)
    new[:2] = 1.02
    W = with_spectrum(torch.cat([old, new]).double(), N, N)
    U, S, Vh = torch.linalg.svd(with_spectrum(torch.cat([old, 0 * new]).double(), N, N).double())
    start = LowRank((U[:, :16] * S[:16].sqrt()).float(), (S[:16].sqrt()[:, None] * Vh[:16]).float())
    truth = best(W, 16)
    assert float((wide(settle(W, 16, start).top) - truth).norm()) < 1e-5 * float(truth.norm())


@pytest.mark.parametrize("spectrum", ["1/j", "exponential"])
def test_a_start_of_the_directions_beyond_is_not_served(spectrum: str) -> None:
    W = with_spectrum(SPECTRA[spectrum], N, N)
    U, S, Vh = torch.linalg.svd(W.double())
    for r in (1, 4, 16):
        start = LowRank(U[:, r : 2 * r].float(), Vh[r : 2 * r].float())
        truth = best(W, r)
        assert float((wide(settle(W, r, start).top) - truth).norm()) < 1e-5 * float(truth.norm())


def few_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that products of a hundred columns go the way that those of a thousand go."""
    monkeypatch.setattr(lowrank, "SMALL", 64)
    monkeypatch.setattr(lowrank, "GUARD", 8)


def test_a_large_product_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past SMALL only the top is diagonalised: W stays exact, its rank does not grow, and its tails are right."""
    few_are_small(monkeypatch)
    M = random((500, 480), 200, 0)
    found = settle(M, 8)
    assert isinstance(found.W, LowRank) and found.W.rank == 200
    assert float((wide(found.W) - wide(M)).norm()) < 2e-6 * M.norm()
    truth = wide(M)
    for r in (8, 4, 1):
        assert float((wide(found.top.leading(r)) - best(truth, r)).norm()) < 1e-5 * float(best(truth, r).norm())
        assert float(found.tails(8)[r]) == pytest.approx(float((truth - best(truth, r)).norm()), rel=1e-5)


def test_absorbing_is_settling_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of updates that bring new directions and move old ones: exact, orthogonal, and of no needless rank."""
    few_are_small(monkeypatch)
    found, truth = settle(random((500, 480), 140, 0), 8), wide(random((500, 480), 140, 0))
    for step in range(1, 6):
        new, old = random((500, 480), 16, step), found.top.leading(4) * 0.5
        found = absorb(found.W, new - old, 8, found.top)
        truth = truth + wide(new) - wide(old)
        assert isinstance(found.W, LowRank) and found.W.rank == 140 + 16 * step
        directions = found.W.B / found.W.B.norm(dim=0)
        assert float((directions.T @ directions - torch.eye(found.W.rank)).abs().max()) < 1e-5
        size = float(truth.norm())
        assert float((wide(found.W) - truth).norm()) < 2e-6 * size
        assert float((wide(found.top) - best(truth, 8)).norm()) < 1e-5 * float(best(truth, 8).norm())
        S = torch.linalg.svdvals(truth)
        expected = [float(S[r:].norm()) for r in range(9)]
        assert found.tails(8).tolist() == pytest.approx(expected, rel=1e-5)
    assert isinstance(absorb(found.W, random((500, 480), 60, 20), 8).W, Tensor)


def test_absorbing_what_is_there_adds_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what rounding adds: of twenty directions that are there, a few leave more of it than is dropped."""
    few_are_small(monkeypatch)
    M = random((500, 480), 150, 0)
    found = settle(M, 8)
    for update, wanted in (
        (LowRank.zeros(500, 480), wide(M)),
        (found.top * 0.5, wide(M) + 0.5 * best(wide(M), 8)),
        (LowRank(M.B[:, :20] * 3, M.A[:20]), wide(M) + 3 * wide(M.leading(20))),
    ):
        after = absorb(found.W, update, 8, found.top)
        assert isinstance(after.W, LowRank) and 150 <= after.W.rank <= 154
        assert float((wide(after.W) - wanted).norm()) < 2e-6 * float(wanted.norm())
    gone = absorb(found.W, -M, 8, found.top)
    assert float(wide(gone.W).norm()) < 2e-6 * M.norm()


def test_plus_keeps_dense_dense() -> None:
    W, M = torch.randn(30, 20, generator=seeded(0)), random((30, 20), 4, 1, torch.bfloat16)
    total = plus(W, M + M)
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total.double(), W.double() + 2 * wide(M))


# --- FedHL over its life ------------------------------------------------------------------------------------------


def trained(M: LowRank, step: int, key: int) -> LowRank:
    """A client's work, as a function of the product alone: ``(I + P) M (I + Q) + N``, and N of the client's rank."""
    (d, k), generator = M.shape, seeded(1000 * step + key)

    def low(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 3, generator=generator) / n**0.5, 0.1 * torch.randn(3, n, generator=generator) / n**0.5

    (P1, P2), (Q1, Q2) = low(d), low(k)
    decay = 1 / torch.arange(1, M.rank + 1)
    B, A = M.B.double(), M.A.double()
    B, A = B + P1.double() @ (P2.double() @ B), A + (A @ Q1.double()) @ Q2.double()
    new = LowRank(
        torch.randn(d, M.rank, generator=generator) * decay / d**0.5,
        torch.randn(M.rank, k, generator=generator) / k**0.5,
    )
    return LowRank(B.to(M.B.dtype), A.to(M.A.dtype)) + new


def paper_weights(missed: Sequence[float]) -> Tensor:
    """Theorem 3, eq. 15 and section VI.A: softmax of the normalised ``1 / (e^2 + 1e-6)``."""
    p = 1 / (torch.tensor(missed, dtype=torch.float64).square() + 1e-6)
    return torch.softmax(p / p.sum(), dim=0)


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((420, 400), (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)), ((560, 520), (16, 8, 4, 4, 2, 2, 1, 1, 1, 1))],
    ids=["the paper's ranks", "a quarter of them"],
)
def test_fedhl_s_life_is_the_dense_recursion_s(shape: tuple[int, int], ranks: tuple[int, ...]) -> None:
    """Twenty rounds from W = 0 through the product stage into the dense stage, against eq. 7 in dense float64."""
    clients = [Client(f"c{i}", 1, r) for i, r in enumerate(ranks)]
    rule = FedHL()
    state = rule.init(Model({"w": torch.empty(*shape, device="meta")}), clients)
    truth = torch.zeros(shape, dtype=torch.float64)
    stages = []
    for index in range(1, 21):
        rnd = Round(index, seed=0)
        replies = []
        for key, client in enumerate(clients):
            sent = rule.download(state, client, rnd)
            replies.append(Reply(client, sent, {"w": trained(sent["w"], index, key)}))
        state = rule.aggregate(state, replies, rnd)

        U, S, Vh = torch.linalg.svd(truth, full_matrices=False)
        p = paper_weights([float(S[r:].norm()) for r in ranks])
        step = torch.zeros_like(truth)
        for key, r in enumerate(ranks):
            sent64 = LowRank(U[:, :r] * S[:r], Vh[:r])
            step += p[key] * (wide(trained(sent64, index, key)) - wide(sent64))
        truth = truth + step
        stages.append(isinstance(state["W/w"], LowRank))
    error = float((wide(state["W/w"]) - truth).norm() / truth.norm())
    assert error < 1e-4
    assert stages[0] and not stages[-1]


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_fedhl_stays_where_clients_return_what_they_got(rounds: int) -> None:
    clients = [Client(f"c{i}", 1, r) for i, r in enumerate((8, 4, 2, 1))]
    rule = FedHL()
    state = rule.init(Model({"w": torch.empty(120, 100, device="meta")}), clients)
    for index in range(1, rounds + 1):
        sent = [rule.download(state, client, Round(index, 0)) for client in clients]
        replies = [
            Reply(c, s, {"w": trained(s["w"], index, i)}) for i, (c, s) in enumerate(zip(clients, sent, strict=True))
        ]
        state = rule.aggregate(state, replies, Round(index, 0))
    before = wide(state["W/w"])
    assert (rounds == 5) == isinstance(state["W/w"], Tensor)
    for index in range(30, 35):
        sent = [rule.download(state, client, Round(index, 0)) for client in clients]
        state = rule.aggregate(state, [Reply(c, s, s) for c, s in zip(clients, sent, strict=True)], Round(index, 0))
    assert float((wide(state["W/w"]) - before).norm()) < 1e-6 * float(before.norm())
