"""Metrics of any subset of rows, from the stored predictions of finished runs.

metric = metric_of(read(run, "test"), "f1")     # rows → the metric over these rows
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.errors import RunError
from peftkit.evaluation import paired_tests, resampling
from peftkit.evaluation.decisions import MULTI, REGRESSION, SINGLE
from peftkit.evaluation.paired_tests import Figure
from peftkit.runs import folder as folders


@dataclass(frozen=True)
class Scored:
    """One run's predictions of a split."""

    problem_type: str
    labels: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    """Source and gold answer of each row, or source and number of tokens; equal in comparable runs."""
    gold: np.ndarray
    """[rows] class ids, numbers or scored tokens; [rows, labels] of 0 and 1."""
    predicted: np.ndarray
    """Like ``gold``; for a language model, the summed loss of each example."""


def read(run: Path, split: str) -> Scored:
    """Reads ``predictions/<split>.jsonl``; raises RunError if there is none."""
    file = run / "predictions" / f"{split}.jsonl"
    if not file.is_file():
        raise RunError(f"{run}: expected its predictions in predictions/{split}.jsonl; is it a finished run?")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    info = json.loads((run / folders.INFO).read_text(encoding="utf-8"))
    kind, labels = info["problem_type"], tuple(info["labels"])
    if "loss" in lines[0]:
        gold, predicted = _column(lines, "tokens"), _column(lines, "loss")
    elif kind == SINGLE:
        gold, predicted = (np.array([labels.index(line[name]) for line in lines]) for name in ("gold", "predicted"))
    elif kind == MULTI:
        gold, predicted = (
            np.array([[int(label in line[name]) for label in labels] for line in lines])
            for name in ("gold", "predicted")
        )
    else:
        gold, predicted = _column(lines, "gold"), _column(lines, "predicted")
    rows = [(line["file"], line["line"], *np.atleast_1d(answer).tolist()) for line, answer in zip(lines, gold)]
    return Scored(kind, labels, rows, gold, predicted)


def _column(lines: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([line[name] for line in lines], dtype=float)


def comparable(one: Scored, other: Scored) -> bool:
    """Whether two runs were scored on the same rows."""
    return (one.problem_type, one.labels, one.rows) == (other.problem_type, other.labels, other.rows)


def metric_of(scored: Scored, metric: str) -> Figure | None:
    """The metric as a function of rows; None if stored predictions do not determine it."""
    gold, predicted = scored.gold, scored.predicted
    if scored.problem_type == SINGLE:
        classes = len(scored.labels)

        def statistics(rows: np.ndarray) -> Any:
            return resampling.from_confusion(resampling.confusion(gold[rows], predicted[rows], classes))

    elif scored.problem_type == MULTI:
        statistics = resampling.of_sets(gold, predicted)  # type: ignore[assignment]
    elif scored.problem_type == REGRESSION:
        statistics = resampling.of_numbers(gold, predicted)  # type: ignore[assignment]
    else:
        statistics = resampling.of_loss(predicted, gold)  # type: ignore[assignment]
    if metric not in statistics(np.arange(len(gold))):
        return None
    return lambda rows: float(statistics(rows)[metric])


def compare(first: Sequence[Scored], second: Sequence[Scored], metric: str, confidence: float) -> dict[str, Any] | None:
    """Difference (first − second) and its significance; None if undetermined.

    Accuracies of single runs are compared by McNemar's exact test, everything else by the paired bootstrap.
    """
    if not comparable(first[0], second[0]):
        return None
    if metric in {"accuracy", "exact_match"} and len(first) == len(second) == 1 and first[0].problem_type == SINGLE:
        right = [one[0].gold == one[0].predicted for one in (first, second)]
        return {**paired_tests.mcnemar(right[0], right[1], confidence), "test": "McNemar"}
    metrics = [[metric_of(one, metric) for one in runs] for runs in (first, second)]
    if any(function is None for side in metrics for function in side):
        return None
    result = paired_tests.paired(metrics[0], metrics[1], len(first[0].rows), confidence=confidence)  # type: ignore[arg-type]
    return {**result, "test": "paired bootstrap"}


def interval(runs: Sequence[Scored], metric: str, confidence: float) -> tuple[float, float] | None:
    """Percentile interval of the mean over seeds, with rows and seeds resampled; None if undetermined."""
    metrics = [metric_of(one, metric) for one in runs]
    if any(function is None for function in metrics):
        return None
    drawn = paired_tests.resampled([metrics], len(runs[0].rows))[0]  # type: ignore[list-item]
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
