"""All that is said of one split's predictions, as JSON: the end of training and ``peftkit evaluate`` share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from peftkit.evaluation import decisions, intervals, resampling
from peftkit.evaluation.decisions import MULTI, REGRESSION, SINGLE, Decisions
from peftkit.evaluation.direction import greater_is_better
from peftkit.evaluation.mistakes import worst
from peftkit.evaluation.reliability import reliability
from peftkit.schema.recipe import EvaluationConfig
from peftkit.schema.task import Task
from peftkit.schema.types import TaskInfo

Assessment = dict[str, Any]
PAIRS = 1000
"""Rows of a regression whose gold and predicted numbers are kept for a plot."""


def assess(
    task: Task,
    outputs: Mapping[str, np.ndarray],
    rows: Any,
    info: TaskInfo,
    evaluation: EvaluationConfig,
    *,
    split: str = "test",
    seed: int = 0,
) -> Assessment:
    """The whole assessment of one split.

    Args:
        outputs: what ``task.outputs`` gave for the split, gathered in order.
        rows: the split's canonical rows, a ``datasets.Dataset`` or columns by name (``text``, ``_file``, ``_line``).
        seed: of the bootstrap.

    Returns:
        ``split``, ``rows``, ``problem_type``, ``labels``, ``confidence`` (the intervals' level) and ``metrics``: name →
        {value, low, high, interval, greater_is_better}, low and high None where no interval is known. Of classes also
        ``per_class``, ``confusion`` (gold by predicted), ``calibration`` and ``mistakes``; of sets ``per_class`` and
        ``mistakes``; of numbers ``pairs`` ([gold, predicted] of some rows) and ``mistakes``.
    """
    values = task.metrics(outputs, info, evaluation)
    made: Assessment = {
        "split": split,
        "rows": len(outputs["loss"]),
        "problem_type": info.problem_type,
        "labels": list(info.labels),
        "confidence": evaluation.confidence,
    }
    if info.problem_type not in decisions.HOLDS:
        limits = intervals.bootstrap(
            resampling.of_loss(outputs["loss"], outputs["weight"]), made["rows"], confidence=evaluation.confidence
        )
        return made | {
            "metrics": _with_intervals(values, {name: (*pair, "bootstrap") for name, pair in limits.items()})
        }
    found = decisions.decide(outputs["logits"], info, getattr(task, "threshold", 0.5))
    gold = decisions.references(outputs, info)
    made["metrics"] = _with_intervals(values, _intervals(outputs, found, gold, info, evaluation.confidence, seed))
    made |= _details(found, gold, info)
    made["mistakes"] = worst(found, gold, columns(rows), info, evaluation.worst)
    return made


def columns(rows: Any) -> Mapping[str, Sequence[Any]]:
    """A ``datasets.Dataset`` or a list of rows as columns by name."""
    if isinstance(rows, Mapping):
        return rows
    if hasattr(rows, "column_names"):
        wanted = ("text", "text_pair", "_file", "_line")
        return {name: rows[name] for name in wanted if name in rows.column_names}
    return {name: [row[name] for row in rows] for name in (rows[0] if len(rows) else {"text": None})}


def _with_intervals(values: Mapping[str, float], limits: Mapping[str, tuple[float, float, str]]) -> dict[str, Any]:
    made = {}
    for name, value in values.items():
        low, high, kind = limits.get(name, (None, None, None))
        made[name] = {
            "value": value if np.isfinite(value) else None,
            "low": low,
            "high": high,
            "interval": kind,
            "greater_is_better": greater_is_better(name),
        }
    return made


def _intervals(
    outputs: Mapping[str, np.ndarray], found: Decisions, gold: np.ndarray, info: TaskInfo, confidence: float, seed: int
) -> dict[str, tuple[float, float, str]]:
    """(low, high, kind) by figure: Wilson's for shares of rows, the bootstrap for the rest."""
    predicted, rows = found.predicted, len(gold)
    if info.problem_type == SINGLE:
        statistics = resampling.of_classes(gold, predicted, found.confidence, len(info.labels))
        right = gold == predicted
    elif info.problem_type == MULTI:
        statistics, right = resampling.of_sets(gold, predicted), (gold == predicted).all(axis=1)
    else:
        statistics, right = resampling.of_numbers(gold, predicted), None
    losses = resampling.of_loss(outputs["loss"], outputs["weight"])
    drawn = intervals.bootstrap(
        lambda chosen: {**statistics(chosen), **losses(chosen)}, rows, confidence=confidence, seed=seed
    )
    made = {name: (*pair, "bootstrap") for name, pair in drawn.items()}
    if right is not None and rows:
        made |= dict.fromkeys(("accuracy", "exact_match"), (*intervals.wilson(right.sum(), rows, confidence), "wilson"))
    return made


def _details(found: Decisions, gold: np.ndarray, info: TaskInfo) -> Assessment:
    if info.problem_type == REGRESSION:
        chosen = np.linspace(0, len(gold) - 1, min(PAIRS, len(gold))).astype(int)
        return {"pairs": [[float(gold[row]), float(found.predicted[row])] for row in chosen]}
    if info.problem_type == MULTI:
        return {"per_class": _per_class(gold, found.predicted, info.labels)}
    classes = len(info.labels)
    counts = resampling.confusion(gold, found.predicted, classes)
    ids = np.arange(classes)
    return {
        "per_class": _per_class(gold[:, None] == ids, found.predicted[:, None] == ids, info.labels),
        "confusion": counts.tolist(),
        "calibration": {"bins": [asdict(one) for one in reliability(found.confidence, found.predicted == gold)]},
    }


def _per_class(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each label by scikit-learn, with the rows that have it and that were given it."""
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(gold.astype(int), predicted.astype(int), average=None, zero_division=0)
    if len(labels) == 1:  # of one column scikit-learn scores the classes 0 and 1
        scores = [score[-1:] for score in scores]
    return [
        {
            "label": label,
            "precision": float(scores[0][number]),
            "recall": float(scores[1][number]),
            "f1": float(scores[2][number]),
            "rows": int(scores[3][number]),
            "predicted": int(predicted[:, number].sum()),
        }
        for number, label in enumerate(labels)
    ]
