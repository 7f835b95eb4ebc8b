"""Confidence intervals: Wilson's for a share of rows, the bootstrap for everything else.

Wilson 1927, "Probable inference, the law of succession, and statistical inference"; Efron 1987, "Better bootstrap
confidence intervals" (BCa: bias-corrected and accelerated).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.stats import norm

Interval = tuple[float, float]
Statistics = Callable[[np.ndarray], Mapping[str, float]]
RESAMPLES = 1000
BCA_ROWS = 2000
"""Up to this many rows BCa is used: it takes one evaluation per row, and its correction vanishes as rows grow."""


def wilson(successes: float, rows: int, confidence: float = 0.95) -> Interval:
    """Interval of a share: ``successes`` of ``rows`` independent rows; never leaves [0, 1], unlike p ± z·σ."""
    if rows == 0:
        return (0.0, 1.0)
    z = float(norm.ppf(0.5 + confidence / 2))
    share = successes / rows
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * np.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return (max(0.0, float(middle - half)), min(1.0, float(middle + half)))


def bootstrap(
    statistics: Statistics,
    rows: int,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    bca: bool | None = None,
) -> dict[str, Interval]:
    """Intervals of several statistics from the same resamples of the rows.

    Args:
        statistics: takes row numbers, repeats allowed, and gives the metrics of these rows.
        bca: correct bias and skewness (Efron 1987); None does so up to BCA_ROWS rows, and takes percentiles beyond.

    Returns:
        (low, high) of each metric; one that is undefined (NaN) on the rows or on a tenth of the resamples has none.
    """
    if rows < 2:
        return {}
    everything = np.arange(rows)
    point = statistics(everything)
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = [statistics(generator.integers(0, rows, rows)) for _ in range(resamples)]
    correct = rows <= BCA_ROWS if bca is None else bca
    left_out = [statistics(np.delete(everything, row)) for row in range(rows)] if correct else []
    limits = {}
    for name, value in point.items():
        values = np.array([one[name] for one in drawn], dtype=np.float64)
        if not np.isfinite(value) or np.isfinite(values).mean() < 0.9:
            continue
        jackknife = np.array([one[name] for one in left_out], dtype=np.float64)
        limits[name] = _quantiles(values[np.isfinite(values)], value, jackknife, confidence)
    return limits


def _quantiles(values: np.ndarray, point: float, jackknife: np.ndarray, confidence: float) -> Interval:
    levels = np.array([0.5 - confidence / 2, 0.5 + confidence / 2])
    if len(jackknife):
        levels = _bca_levels(values, point, jackknife, levels)
    low, high = np.quantile(values, levels)
    return (float(low), float(high))


def _bca_levels(values: np.ndarray, point: float, jackknife: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Efron's corrected levels Φ(z₀ + (z₀ + z) / (1 − a (z₀ + z))); the plain ones where they are not defined."""
    below = (np.sum(values < point) + np.sum(values <= point)) / (2 * len(values))
    gaps = jackknife.mean() - jackknife
    spread = 6 * np.sum(gaps**2) ** 1.5
    if not (0 < below < 1 and np.isfinite(spread) and spread > 0):
        return levels
    bias, acceleration = norm.ppf(below), np.sum(gaps**3) / spread
    shifted = bias + norm.ppf(levels)
    return norm.cdf(bias + shifted / (1 - acceleration * shifted))
