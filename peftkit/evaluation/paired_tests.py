"""Which is better: two sets of predictions for the same rows.

McNemar 1947, "Note on the sampling error of the difference between correlated proportions", in its exact form: of the
rows that only one of the two has right, each side would have half if they were equally good. For every other metric
the paired bootstrap: both are scored on the same resamples of the rows, and, where each was trained with several seeds,
on resamples of its seeds as well, so that a lucky seed does not count as a better method (Bouthillier et al. 2021,
"Accounting for variance in machine learning benchmarks", arXiv:2103.03098).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm


def mcnemar(first: np.ndarray, second: np.ndarray, confidence: float = 0.95) -> dict[str, Any]:
    """Compares two classifiers by whether each row is right, [rows] each.

    Returns:
        ``difference`` of the accuracies (first − second) with ``low`` and ``high`` (Wald's interval for paired shares),
        ``only_first`` and ``only_second`` (rows that only this one has right), ``rows``, and the two-sided exact
        ``p_value``.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    assert first.shape == second.shape, "the same rows"
    rows = len(first)
    gained, lost = int(np.sum(first & ~second)), int(np.sum(~first & second))
    p_value = float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
    difference = (gained - lost) / rows if rows else 0.0
    spread = np.sqrt(max(0.0, gained + lost - (gained - lost) ** 2 / rows)) / rows if rows else 0.0
    half = float(norm.ppf(0.5 + confidence / 2) * spread)
    return {
        "rows": rows,
        "difference": difference,
        "low": max(-1.0, difference - half),
        "high": min(1.0, difference + half),
        "only_first": gained,
        "only_second": lost,
        "p_value": p_value,
    }


Metric = Callable[[np.ndarray], float]
"""Row numbers, repeats allowed → the metric of these rows."""
RESAMPLES = 2000


def paired(
    first: Sequence[Metric], second: Sequence[Metric], rows: int, *, confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Compares two methods by a metric of the same rows.

    Args:
        first, second: each method's metric, one function per training seed; the mean over seeds is compared.
        rows: number of rows.

    Returns:
        ``difference`` (first − second) with ``low`` and ``high`` (percentiles of the resamples), ``rows``, and the
        two-sided ``p_value``: twice the smaller share of resamples on one side of zero, which is never below
        2 ÷ (RESAMPLES + 1).
    """
    drawn = np.subtract(*resampled((first, second), rows, seed=seed))
    everything = np.arange(rows)
    difference = np.mean([one(everything) for one in first]) - np.mean([one(everything) for one in second])
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    side = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
    return {
        "rows": rows,
        "difference": float(difference),
        "low": float(low),
        "high": float(high),
        "p_value": float(min(1.0, 2 * (side + 1) / (RESAMPLES + 1))),
    }


def resampled(methods: Sequence[Sequence[Metric]], rows: int, *, seed: int = 0) -> np.ndarray:
    """Mean metrics [methods, RESAMPLES]: the rows of a resample are shared by all methods, the seeds are not."""
    generator = np.random.Generator(np.random.PCG64(seed))
    means = np.empty((len(methods), RESAMPLES))
    for number in range(RESAMPLES):
        chosen = generator.integers(0, rows, rows)
        for method, metrics in enumerate(methods):
            seeds = generator.integers(0, len(metrics), len(metrics))
            known = {one: metrics[one](chosen) for one in set(seeds.tolist())}
            means[method, number] = np.mean([known[one] for one in seeds.tolist()])
    return means


def verdict(compared: dict[str, Any], other: str, *, of_loss: bool = False, level: float = 0.05) -> str:
    """One sentence for the user: "finetuning helped: +12.3 points against zero shot (p < 0.001)"."""
    difference, p_value = compared["difference"], compared["p_value"]
    change = f"loss {difference:+.3f}" if of_loss else f"{difference * 100:+.1f} points"
    text = f"{change} against {other.replace('_', ' ')} (p {'< 0.001' if p_value < 0.001 else f'= {p_value:.3f}'})"
    if p_value >= level:
        return f"no difference that {compared['rows']:,} {'examples' if of_loss else 'rows'} can show: {text}"
    return f"finetuning {'helped' if (difference < 0) == of_loss else 'hurt'}: {text}"
