"""Intervals of scores over test rows: Wilson's for shares, the bootstrap for the rest."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np


def interval(
    above: np.ndarray, below: np.ndarray, *, seed: int = 0, resamples: int = 1000, confidence: float = 0.95
) -> dict[str, Any]:
    """``sum(above) / sum(below)`` over rows, with its interval and how that was made.

    Rows that are right or wrong give Wilson's interval (1927). Others give the percentile bootstrap over rows (Efron,
    1979); where all rows of a score from 0 to 1 agree, that has no width, and Wilson's of as many rows stands in.
    """
    value, n = float(above.sum() / below.sum()), len(above)
    if bool(np.all(below == 1)) and bool(np.all((above == 0) | (above == 1))):
        low, high = wilson(value, n, confidence)
        return {"value": value, "low": low, "high": high, "rows": n, "interval": "wilson"}
    rng = np.random.default_rng([seed, 2])
    drawn = (rng.integers(n, size=n) for _ in range(resamples))
    ratios = [above[rows].sum() / below[rows].sum() for rows in drawn]
    tail = (1 - confidence) / 2
    low, high = (float(end) for end in np.quantile(ratios, [tail, 1 - tail]))
    if low == high and bool(np.all(below == 1)) and 0 <= value <= 1:
        low, high = wilson(value, n, confidence)
        return {"value": value, "low": low, "high": high, "rows": n, "interval": "wilson"}
    return {"value": value, "low": low, "high": high, "rows": n, "interval": "bootstrap"}


def wilson(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of ``n`` rows: never of width 0, inside [0, 1]."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return (0.0 if share == 0 else max(0.0, centre - half)), (1.0 if share == 1 else min(1.0, centre + half))
