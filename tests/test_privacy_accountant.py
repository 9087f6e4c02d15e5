"""The accountant against published tables, a second library, and a mechanism whose loss is known exactly."""

import math

import pytest
import torch
from scipy.stats import norm

from fedllm.privacy import noise
from fedllm.privacy.accountant import Release, epsilon, noise_multiplier

DELTA = 1e-5


@pytest.mark.parametrize(
    ("q", "rounds", "z", "wanted"),
    [
        pytest.param(0.1, 200, 1.0, 9.9713, marks=pytest.mark.slow),
        pytest.param(0.1, 200, 2.0, 3.3597, marks=pytest.mark.slow),
        (0.1, 200, 4.0, 1.4217),
        pytest.param(0.15, 20, 1.0, 5.1247, marks=pytest.mark.slow),
        (0.15, 20, 2.0, 1.6457),
        (1.0, 20, 0.5, 77.33),
        (1.0, 20, 1.0, 28.3735),
        (1.0, 20, 4.0, 4.9833),
        (1.0, 3, 1.0, 8.385),
        (1.0, 1, 1.0, 4.377),
    ],
)
def test_epsilon_is_that_of_the_table(q, rounds, z, wanted):
    assert epsilon([Release(z, q, rounds)], DELTA) == pytest.approx(wanted, rel=2e-4)


def test_a_second_library_agrees():
    """Opacus' PRV accountant reports the upper end of its interval, 0.01 wide."""
    prv = pytest.importorskip("opacus.accountants").PRVAccountant()
    prv.history = [(1.0, 0.15, 20)]
    assert epsilon([Release(1.0, 0.15, 20)], DELTA) == pytest.approx(prv.get_epsilon(DELTA), abs=0.02)


def test_renyi_moments_are_above_the_loss_distribution():
    rdp = pytest.importorskip("opacus.accountants").RDPAccountant()
    rdp.history = [(2.0, 0.15, 20)]
    assert rdp.get_epsilon(DELTA) > epsilon([Release(2.0, 0.15, 20)], DELTA)


@pytest.mark.parametrize(("target", "q", "count", "z"), [(8.0, 1.0, 20, 2.6843), (1.0, 1.0, 20, 16.684)])
def test_a_target_gives_noise_that_keeps_it(target, q, count, z):
    found = noise_multiplier(target, DELTA, q, count)
    assert found == pytest.approx(z, abs=2e-4)
    assert epsilon([Release(found, q, count)], DELTA) <= target
    assert epsilon([Release(found - 1e-3, q, count)], DELTA) > target


@pytest.mark.slow
def test_a_target_under_poisson_sampling():
    found = noise_multiplier(8.0, DELTA, 0.1, 200)
    assert found == pytest.approx(1.1297, abs=1e-3)
    assert epsilon([Release(found, 0.1, 200)], DELTA) <= 8.0


def test_releases_of_different_noise_compose():
    """Two Gaussians of z are one of z / sqrt 2, and the order says nothing."""
    both = epsilon([Release(1.0), Release(2.0)], DELTA)
    assert both == epsilon([Release(2.0), Release(1.0)], DELTA)
    assert both == pytest.approx(epsilon([Release((1 + 1 / 4) ** -0.5)], DELTA))
    assert epsilon([], DELTA) == 0.0
    assert epsilon([Release(0.0)], DELTA) == math.inf


def hockey_stick(eps: float, q: float, z: float) -> float:
    """The delta that this epsilon needs for one round of a fixed-size cohort, a share q of all, for an explicit pair.

    One client sends C, or nothing at all; all others send -C. Where it takes part it also keeps another one out.
    """
    y = torch.linspace(-30, 30, 60001, dtype=torch.float64).numpy()
    sends, silent = (q * norm.pdf(y, at, z) + (1 - q) * norm.pdf(y, 0.0, z) for at in (2.0, 1.0))
    apart = [sends - math.exp(eps) * silent, silent - math.exp(eps) * sends]
    return max(float(part.clip(min=0).sum()) for part in apart) * float(y[1] - y[0])


def test_a_cohort_of_fixed_size_is_not_a_poisson_sample():
    """Ten of a hundred: the true epsilon of one round is 3.747 at least, and Poisson's number says 1.685."""
    poisson = epsilon([Release(1.0, 0.1)], DELTA)
    assert poisson == pytest.approx(1.685, abs=0.002)
    assert hockey_stick(poisson, 0.1, 1.0) > 10 * DELTA
    assert hockey_stick(3.746, 0.1, 1.0) > DELTA > hockey_stick(3.748, 0.1, 1.0)


def test_noise_of_the_system_is_normal_and_never_the_same():
    first, second = noise.from_system((200, 100)), noise.from_system((200, 100))
    assert not torch.equal(first, second)
    edges = torch.tensor(norm.ppf([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]))
    counts = torch.bincount(torch.bucketize(first.flatten(), edges), minlength=10).double()
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 45  # chi-square with 9 degrees: above in 1e-6 of all runs


def test_a_coin_is_as_fair_as_asked():
    heads = sum(noise.coin(0.2) for _ in range(5000))
    assert 800 < heads < 1200
    assert not any(noise.coin(0.0) for _ in range(50))
    assert all(noise.coin(1.0) for _ in range(50))
