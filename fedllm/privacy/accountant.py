"""Epsilon of Gaussian releases, by Google's dp-accounting: privacy loss distributions, or the closed form.

The sampling that a number assumes is part of the number. ``sampling_probability`` below 1 means Poisson: each member
joins by a coin of its own that nobody else sees. A cohort of fixed size is not that, and its epsilon is larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fedllm.errors import FedError

STEP = 1e-4
"""Noise multipliers found for a target are rounded up to a multiple of this, so that plan and run print one number."""


@dataclass(frozen=True)
class Release:
    """``count`` Gaussian releases of a sum to which one member adds a vector of norm C at most.

    Args:
        noise_multiplier: z: the noise has standard deviation ``z C`` in every coordinate.
        sampling_probability: q, of a Poisson sample; 1 where who took part may be known.
        count: how often.
    """

    noise_multiplier: float
    sampling_probability: float = 1.0
    count: int = 1


def library() -> Any:
    """dp-accounting, imported where a number is asked for.

    Raises:
        FedError: where it is not installed.
    """
    try:
        import dp_accounting
    except ImportError as error:
        raise FedError("an epsilon needs dp-accounting: install this package's extra `privacy`.") from error
    return dp_accounting


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """The smallest epsilon known for all of these releases together, at ``delta``; adaptively composed."""
    counts: dict[Release, int] = {}
    for release in releases:
        one = replace(release, count=1)
        counts[one] = counts.get(one, 0) + release.count
    return _epsilon(tuple(replace(one, count=count) for one, count in counts.items() if count), delta)


@lru_cache(maxsize=4096)
def _epsilon(releases: tuple[Release, ...], delta: float) -> float:
    if not releases:
        return 0.0
    if any(release.noise_multiplier == 0 for release in releases):
        return math.inf
    if all(release.sampling_probability == 1 for release in releases):
        precision = sum(release.count / release.noise_multiplier**2 for release in releases)
        return float(library().get_epsilon_gaussian(precision**-0.5, delta))  # k Gaussians are one, Dong et al. (2022)
    from dp_accounting import pld

    accountant = pld.PLDAccountant()
    for release in releases:
        accountant.compose(_event(release), release.count)
    return float(accountant.get_epsilon(delta))


def _event(release: Release) -> Any:
    events = library()
    noise = events.GaussianDpEvent(release.noise_multiplier)
    q = release.sampling_probability
    return noise if q == 1 else events.PoissonSampledDpEvent(q, noise)


@lru_cache(maxsize=256)
def noise_multiplier(target: float, delta: float, sampling_probability: float, count: int) -> float:
    """The smallest z, up to ``STEP``, by which ``count`` releases stay within epsilon ``target`` at ``delta``."""
    events = library()
    if sampling_probability == 1:
        z = events.get_sigma_gaussian(target, delta) * math.sqrt(count)
    else:
        from dp_accounting import pld

        z = events.calibrate_dp_mechanism(
            pld.PLDAccountant,
            lambda z: events.SelfComposedDpEvent(_event(Release(z, sampling_probability)), count),
            target,
            delta,
            bracket_interval=events.LowerEndpointAndGuess(0.0, 1.0),
            tol=STEP / 2,
        )
    z = math.ceil(z / STEP) * STEP
    while epsilon([Release(z, sampling_probability, count)], delta) > target:
        z += STEP
    return round(z, 6)
