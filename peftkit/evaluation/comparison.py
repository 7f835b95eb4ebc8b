"""Did finetuning help: two sets of predictions for the same rows.

McNemar 1947, "Note on the sampling error of the difference between correlated proportions", in its exact form: of the
rows that only one of the two has right, each side would have half if they were equally good.
"""

from __future__ import annotations

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


def verdict(compared: dict[str, Any], other: str, level: float = 0.05) -> str:
    """One sentence for the user: "finetuning helped: +12.3 points against zero shot (p < 0.001)"."""
    points = f"{compared['difference'] * 100:+.1f} points against {other.replace('_', ' ')}"
    p_value = compared["p_value"]
    chance = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    if p_value >= level:
        return f"no difference that {compared['rows']:,} rows can show: {points} ({chance})"
    return f"finetuning {'helped' if compared['difference'] > 0 else 'hurt'}: {points} ({chance})"
