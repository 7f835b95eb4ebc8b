"""Metrics of a choice of rows, fast enough for a thousand bootstrap resamples.

Each function prepares arrays once and returns ``statistics(rows) → {name: value}`` for ``intervals.bootstrap``. Names
and values are those of ``metrics``; scikit-learn's own functions would take minutes here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peftkit.evaluation.intervals import Statistics
from peftkit.evaluation.reliability import of_surplus, places


def confusion(gold: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts [classes, classes], gold by predicted."""
    return np.bincount(gold * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def of_classes(gold: np.ndarray, predicted: np.ndarray, confidence: np.ndarray | None, classes: int) -> Statistics:
    """Statistics of one label per row; the calibration error only where the confidence is known."""
    surplus = None if confidence is None else (places(confidence), (gold == predicted) - confidence)

    def statistics(rows: np.ndarray) -> dict[str, float]:
        metrics = from_confusion(confusion(gold[rows], predicted[rows], classes))
        return metrics | ({"calibration_error": of_surplus(*(one[rows] for one in surplus))} if surplus else {})

    return statistics


def from_confusion(counts: np.ndarray) -> dict[str, float]:
    """Metrics of a confusion matrix [classes, classes], gold by predicted."""
    hits, gold, predicted = np.diag(counts).astype(float), counts.sum(axis=1), counts.sum(axis=0)
    total = counts.sum()
    present = (gold + predicted) > 0
    precision, recall, f1 = _ratio(hits, predicted), _ratio(hits, gold), _ratio(2 * hits, gold + predicted)
    accuracy = hits.sum() / total
    left = hits.sum() * total - float(gold @ predicted)
    scale = np.sqrt((float(total) ** 2 - float(gold @ gold)) * (float(total) ** 2 - float(predicted @ predicted)))
    return {
        "accuracy": accuracy,
        "exact_match": accuracy,
        "f1_micro": accuracy,
        "hamming_loss": 1 - accuracy,
        "balanced_accuracy": recall[gold > 0].mean(),
        "precision": precision[present].mean(),
        "recall": recall[present].mean(),
        "f1": f1[present].mean(),
        "f1_weighted": float(f1 @ gold) / total,
        "matthews_correlation": left / scale if scale else 0.0,
    }


def of_sets(gold: np.ndarray, predicted: np.ndarray) -> Statistics:
    """Statistics of several labels per row, [rows, labels] of 0 and 1."""
    hits, wrong, equal = gold & predicted, (gold != predicted).mean(axis=1), (gold == predicted).all(axis=1)

    def statistics(rows: np.ndarray) -> dict[str, float]:
        hit, given, asked = hits[rows].sum(axis=0), predicted[rows].sum(axis=0), gold[rows].sum(axis=0)
        f1, both = _ratio(2.0 * hit, given + asked), float((given + asked).sum())
        exact = equal[rows].mean()
        return {
            "f1": f1.mean(),
            "f1_micro": 2.0 * hit.sum() / both if both else 0.0,
            "f1_weighted": float(f1 @ asked) / asked.sum() if asked.sum() else 0.0,
            "precision": _ratio(hit, given).mean(),
            "recall": _ratio(hit, asked).mean(),
            "accuracy": exact,
            "exact_match": exact,
            "hamming_loss": wrong[rows].mean(),
        }

    return statistics


def of_numbers(gold: np.ndarray, predicted: np.ndarray) -> Statistics:
    """Statistics of a regression."""
    from scipy.stats import rankdata

    def statistics(rows: np.ndarray) -> dict[str, float]:
        truth, guess = gold[rows], predicted[rows]
        error, spread = guess - truth, np.sum((truth - truth.mean()) ** 2)
        return {
            "mse": np.mean(error**2),
            "mae": np.mean(np.abs(error)),
            "r2": 1 - np.sum(error**2) / spread if spread else float("nan"),
            "pearsonr": _correlation(truth, guess),
            "spearmanr": _correlation(rankdata(truth), rankdata(guess)),
        }

    return statistics


def of_groups(first: np.ndarray, rows: int, metrics: Callable[[np.ndarray], dict[str, float]]) -> Statistics:
    """Statistics of groups of rows, such as the windows of a text: a group counts where its first row is drawn.

    Args:
        first: the first row of each group.
        rows: how many rows there are in all.
        metrics: takes numbers of groups, repeats allowed, and gives their metrics.
    """
    number = np.full(rows, -1)
    number[first] = np.arange(len(first))

    def statistics(chosen: np.ndarray) -> dict[str, float]:
        groups = number[chosen]
        return metrics(groups[groups >= 0])

    return statistics


def of_loss(loss: np.ndarray, weight: np.ndarray) -> Statistics:
    """Statistics of the mean loss Σ loss ÷ Σ weight."""

    def statistics(rows: np.ndarray) -> dict[str, float]:
        total = weight[rows].sum()
        return {"loss": loss[rows].sum() / total if total else float("nan")}

    return statistics


def _ratio(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    """part ÷ total, 0 where total is 0."""
    return np.divide(part, total, out=np.zeros(len(part)), where=total > 0)


def _correlation(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left - left.mean(), right - right.mean()
    scale = np.sqrt(np.sum(left**2) * np.sum(right**2))
    return float(np.sum(left * right) / scale) if scale else float("nan")
