"""The predictions that finished runs left behind, as figures of any choice of rows.

figure = figure_of(read(run, "test"), "f1")     # rows → the figure of these rows
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

SAME_ROWS = "are compared row by row, so all must be scored on the same rows"


@dataclass(frozen=True)
class Scored:
    """One run's predictions of a split."""

    problem_type: str
    labels: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    """What the rows are: place and gold answer, or place and number of tokens; equal in runs that can be compared."""
    gold: np.ndarray
    """[rows] class ids, numbers or scored tokens; [rows, labels] of 0 and 1."""
    predicted: np.ndarray
    """In the form of ``gold``; of a language model each example's summed loss."""


def read(run: Path, split: str) -> Scored:
    """Reads ``predictions/<split>.jsonl``; raises RunError where there is none."""
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
    """Whether two runs answered the same questions."""
    return (one.problem_type, one.labels, one.rows) == (other.problem_type, other.labels, other.rows)


def figure_of(scored: Scored, metric: str) -> Figure | None:
    """The figure of a choice of rows; None where the stored predictions do not tell it."""
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
    """Difference (first − second) and its significance; None where it cannot be told.

    The accuracies of one run each are compared by McNemar's exact test, everything else by the paired bootstrap.
    """
    if not comparable(first[0], second[0]):
        return None
    if metric in {"accuracy", "exact_match"} and len(first) == len(second) == 1 and first[0].problem_type == SINGLE:
        right = [one[0].gold == one[0].predicted for one in (first, second)]
        return {**paired_tests.mcnemar(right[0], right[1], confidence), "test": "McNemar"}
    figures = [[figure_of(one, metric) for one in runs] for runs in (first, second)]
    if any(figure is None for side in figures for figure in side):
        return None
    found = paired_tests.paired(figures[0], figures[1], len(first[0].rows), confidence=confidence)  # type: ignore[arg-type]
    return {**found, "test": "paired bootstrap"}


def interval(runs: Sequence[Scored], metric: str, confidence: float) -> tuple[float, float] | None:
    """Percentile interval of the mean over seeds, rows and seeds resampled; None where it cannot be told."""
    figures = [figure_of(one, metric) for one in runs]
    if any(figure is None for figure in figures):
        return None
    drawn = paired_tests.resampled([figures], len(runs[0].rows))[0]  # type: ignore[list-item]
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
