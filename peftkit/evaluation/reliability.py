"""Whether a probability means what it says: reliability bins and the expected calibration error.

Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599: predictions are put into equal bins by
their confidence p̂ (the probability of the predicted class), and

    ECE = Σ_b |B_b| / n · |accuracy(B_b) − confidence(B_b)|
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence lies in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> list[Bin]:
    """The bins that hold predictions, from the least confident to the most.

    Args:
        confidence: probability of the predicted class, [rows].
        correct: whether it was right, [rows].
    """
    edges, place = np.linspace(0.0, 1.0, bins + 1), places(confidence, bins)
    filled = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            mean, right = float(confidence[inside].mean()), float(correct[inside].mean())
            filled.append(Bin(float(edges[number]), float(edges[number + 1]), int(inside.sum()), mean, right))
    return filled


def places(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The number of the bin that each confidence lies in, [rows]."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    # (low, high]: a confidence on an edge belongs to the bin below it, and 0 to the first
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Mean distance of accuracy and confidence over the bins, weighted by their rows; 0 is perfect."""
    return of_surplus(places(confidence, bins), correct - np.asarray(confidence))


def of_surplus(place: np.ndarray, surplus: np.ndarray) -> float:
    """The expected calibration error from each row's bin and its correct − confidence; NaN without rows.

    |B| · |accuracy(B) − confidence(B)| is |Σ (correct − confidence)| over the bin, which one count gives for all bins.
    """
    return float(np.abs(np.bincount(place, weights=surplus)).sum() / len(place)) if len(place) else float("nan")
