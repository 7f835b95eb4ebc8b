"""Metrics of any subset of rows, from the stored predictions of finished runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.errors import RunError
from peftkit.evaluation import paired_tests
from peftkit.evaluation.paired_tests import Metric
from peftkit.runs import folder as folders
from peftkit.schema.head import StoredPredictions, head_of
from peftkit.schema.types import TaskInfo


@dataclass(frozen=True)
class Scored:
    """One run's predictions of a split."""

    question: tuple[Any, ...]
    """What was learned and with which labels; equal in runs that can be compared, like ``rows``."""
    rows: list[tuple[Any, ...]]
    """Source and gold answer of each row, or source and number of tokens."""
    stored: StoredPredictions


def read(run: Path, split: str) -> Scored:
    """Reads ``predictions/<split>.jsonl``; raises RunError if there is none."""
    file = run / "predictions" / f"{split}.jsonl"
    if not file.is_file():
        raise RunError(f"{run}: expected its predictions in predictions/{split}.jsonl; is it a finished run?")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    values = json.loads((run / folders.INFO).read_text(encoding="utf-8"))
    info = TaskInfo(values["problem_type"], tuple(values["labels"]))
    stored = head_of(info).read_predictions(lines)
    rows = [(line["file"], line["line"], *np.atleast_1d(answer).tolist()) for line, answer in zip(lines, stored.gold)]
    return Scored((info.problem_type, info.labels), rows, stored)


def compare(first: Sequence[Scored], second: Sequence[Scored], metric: str, confidence: float) -> dict[str, Any] | None:
    """Difference (first − second) and its significance; None if undetermined, or if the rows are not the same.

    Accuracies of single runs are compared by McNemar's exact test, everything else by the paired bootstrap.
    """
    if (first[0].question, first[0].rows) != (second[0].question, second[0].rows):
        return None
    right = [one.stored.right for one in (*first, *second)]
    if metric in {"accuracy", "exact_match"} and len(right) == 2 and right[0] is not None and right[1] is not None:
        return {**paired_tests.mcnemar(right[0], right[1], confidence), "test": "McNemar"}
    metrics, others = _metrics(first, metric), _metrics(second, metric)
    if metrics is None or others is None:
        return None
    result = paired_tests.paired(metrics, others, len(first[0].rows), confidence=confidence)
    return {**result, "test": "paired bootstrap"}


def interval(runs: Sequence[Scored], metric: str, confidence: float) -> tuple[float, float] | None:
    """Percentile interval of the mean over seeds, with rows and seeds resampled; None if undetermined."""
    metrics = _metrics(runs, metric)
    if metrics is None:
        return None
    drawn = paired_tests.resampled([metrics], len(runs[0].rows))[0]
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _metrics(runs: Sequence[Scored], name: str) -> list[Metric] | None:
    """The metric of each run as a function of rows; None if stored predictions do not determine it."""

    def metric_of(run: Scored) -> Metric:
        return lambda rows: float(run.stored.statistics(rows)[name])

    known = all(name in run.stored.statistics(np.arange(len(run.rows))) for run in runs)
    return [metric_of(run) for run in runs] if known else None
