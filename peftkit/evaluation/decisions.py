"""From a classifier's logits to decisions, and from decisions to named figures. Tasks may use it, like the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from peftkit.errors import RecipeError
from peftkit.evaluation import metrics
from peftkit.evaluation.reliability import expected_calibration_error
from peftkit.schema.types import TaskInfo

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
HOLDS: dict[str, metrics.Holds] = {SINGLE: "classes", MULTI: "sets", REGRESSION: "numbers"}
DEFAULTS = {
    SINGLE: ("accuracy", "precision", "recall", "f1", "f1_weighted", "matthews_correlation", "calibration_error"),
    MULTI: ("f1_micro", "f1", "precision", "recall", "exact_match", "hamming_loss"),
    REGRESSION: ("mse", "mae", "pearsonr", "spearmanr", "r2"),
}
"""Figures of each problem type when the recipe names none."""


@dataclass(frozen=True)
class Decisions:
    """What a classifier says of each row."""

    predicted: np.ndarray
    """[rows] class ids; [rows, labels] 0/1; or [rows] numbers of a regression."""
    probabilities: np.ndarray | None
    """[rows, labels]: softmax for one label, sigmoid for several; None for a regression."""

    @property
    def confidence(self) -> np.ndarray:
        """[rows]: the probability of the predicted class; for several labels, of the least certain decision."""
        assert self.probabilities is not None
        if self.predicted.ndim == 2:
            return np.where(self.predicted == 1, self.probabilities, 1 - self.probabilities).min(axis=1)
        return self.probabilities.max(axis=1)


def decide(logits: np.ndarray, info: TaskInfo, threshold: float = 0.5) -> Decisions:
    """Classes and probabilities from logits [rows, labels].

    Args:
        threshold: probability from which a label counts as given, where a row may have several.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if info.problem_type == REGRESSION:
        return Decisions(logits.reshape(len(logits)), None)
    if info.problem_type == MULTI:
        probabilities = 0.5 * (1 + np.tanh(logits / 2))
        return Decisions((probabilities >= threshold).astype(np.int64), probabilities)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return Decisions(logits.argmax(axis=1), shifted / shifted.sum(axis=1, keepdims=True))


def references(outputs: Mapping[str, np.ndarray], info: TaskInfo) -> np.ndarray:
    """The gold labels in the same form as ``Decisions.predicted``."""
    labels = np.asarray(outputs["labels"])
    return (
        labels.astype(np.float64).reshape(len(labels)) if info.problem_type == REGRESSION else labels.astype(np.int64)
    )


def mean_loss(outputs: Mapping[str, np.ndarray]) -> float:
    """Σ loss ÷ Σ weight, as in training; NaN without rows."""
    weight = float(np.sum(outputs["weight"], dtype=np.float64))
    return float(np.sum(outputs["loss"], dtype=np.float64)) / weight if weight else float("nan")


def compute_metrics(
    outputs: Mapping[str, np.ndarray],
    info: TaskInfo,
    names: Iterable[str] | None = None,
    *,
    threshold: float = 0.5,
    always: Iterable[str] = (),
) -> dict[str, float]:
    """Named figures of a split, ``loss`` first.

    Args:
        outputs: ``logits`` and ``labels``; ``loss`` and ``weight`` for the loss, which is left out without them.
        names: figures wanted; None for the usual ones of the problem type.
        always: figures that are added to ``names``.

    Raises:
        RecipeError, HubError: see ``metrics.check``.
    """
    found = decide(outputs["logits"], info, threshold)
    gold = references(outputs, info)
    figures = {"loss": mean_loss(outputs)} if "loss" in outputs else {}
    wanted = [*(DEFAULTS[info.problem_type] if names is None else names), *always]
    for name in dict.fromkeys(wanted):
        if name == "loss":
            continue
        if name == "calibration_error":
            if info.problem_type != SINGLE:
                raise RecipeError("metric 'calibration_error' needs one label a row; leave it out")
            figures[name] = expected_calibration_error(found.confidence, found.predicted == gold)
        else:
            figures |= _one(name, gold, found.predicted, HOLDS[info.problem_type])
    return figures


def check(names: Iterable[str] | None, info: TaskInfo) -> None:
    """Raises RecipeError or HubError for a figure that is unknown or does not fit; for use before training."""
    for name in names or ():
        if name == "calibration_error" and info.problem_type != SINGLE:
            raise RecipeError("metric 'calibration_error' needs one label a row; leave it out")
        if name not in metrics.OF_PROBABILITIES:
            metrics.check(name, HOLDS[info.problem_type])


def _one(name: str, gold: np.ndarray, predicted: np.ndarray, holds: metrics.Holds) -> dict[str, float]:
    """What a metric says; NaN without rows."""
    if not len(gold):
        return {name: float("nan")}
    return metrics.compute_metric(name, predicted, gold, holds)
