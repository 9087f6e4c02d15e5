"""Averages: by hand, and where a mean of factors and a mean of products part."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.lowrank import LowRank
from fedllm.mean import mean, mean_factors, mean_products, pad


def rank_one(b: list[float], a: list[float]) -> LowRank:
    return LowRank(torch.tensor(b)[:, None], torch.tensor(a)[None])


def test_mean_by_hand() -> None:
    """1/4 (4, 8) + 3/4 (0, 4) = (1, 5)."""
    got = mean([torch.tensor([4.0, 8.0]), torch.tensor([0.0, 4.0])], [0.25, 0.75])
    torch.testing.assert_close(got, torch.tensor([1.0, 5.0]))


def test_mean_of_bf16_is_taken_in_float32() -> None:
    """256 + 1 is 257, which bf16 cannot hold (its neighbours are 256 and 258)."""
    got = mean([torch.tensor([256.0]).bfloat16(), torch.tensor([1.0]).bfloat16()], [1.0, 1.0])
    assert got.dtype == torch.float32 and got.item() == 257.0


def test_mean_leaves_its_terms_alone() -> None:
    terms = [torch.ones(3), torch.full((3,), 3.0)]
    mean(terms, [0.5, 0.5])
    torch.testing.assert_close(terms[0], torch.ones(3))


def test_products_and_factors_differ_by_cross_terms() -> None:
    """M_1 = e_1 e_1^T, M_2 = e_2 e_2^T, p = 1/2 each.

    Products: (M_1 + M_2) / 2 = diag(1/2, 1/2). Factors: B = (1/2, 1/2), A = (1/2, 1/2), so B A = 1/4 everywhere:
    half of each client's own term is lost to cross terms that nobody trained.
    """
    updates = [rank_one([1.0, 0.0], [1.0, 0.0]), rank_one([0.0, 1.0], [0.0, 1.0])]
    torch.testing.assert_close(mean_products(updates, [0.5, 0.5]).dense(), torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
    torch.testing.assert_close(mean_factors(updates, [0.5, 0.5]).dense(), torch.full((2, 2), 0.25))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 2**20),
)
def test_mean_of_products_is_exact(d, k, ranks, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    updates = [
        LowRank(torch.randn(d, r, generator=generator).to(dtype), torch.randn(r, k, generator=generator).to(dtype))
        for r in ranks
    ]
    weights = torch.rand(len(ranks), generator=generator, dtype=torch.float64).tolist()
    got = mean_products(updates, weights)
    terms = [w * (u.B.double() @ u.A.double()) for u, w in zip(updates, weights, strict=True)]
    size = sum(float(term.norm()) for term in terms)
    assert got.rank == sum(ranks)
    torch.testing.assert_close(got.B.double() @ got.A.double(), sum(terms), rtol=0, atol=1e-6 * size)


def test_mixed_ranks_have_no_mean_of_factors() -> None:
    updates = [LowRank.zeros(3, 4), rank_one([1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        mean_factors(updates, [0.5, 0.5])


def test_a_weight_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        mean([torch.ones(2), torch.ones(2)], [1.0])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        mean_products([LowRank.zeros(2, 2), LowRank.zeros(2, 2)], [1.0])


def test_padding_changes_the_rank_and_nothing_else() -> None:
    M = rank_one([1.0, 2.0], [3.0, 4.0, 5.0])
    wider = pad(M, 4)
    assert wider.rank == 4 and wider.shape == (2, 3)
    torch.testing.assert_close(wider.dense(), M.dense())
    assert not wider.B[:, 1:].any() and not wider.A[1:].any()
    with pytest.raises(ValueError, match="rank 4 cannot be padded to rank 2"):
        pad(wider, 2)
