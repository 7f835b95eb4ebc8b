"""Metrics by name, over scikit-learn or SciPy; no network is needed.

    compute_metric("f1", predictions=[0, 1], references=[0, 0])  # {"f1": 0.333…}
    metric = load("f1")                                         # the same as a module of the evaluate library
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.compute()

``evaluate.load`` itself runs a script from the hub; it is asked only for a name that is not here, and only for the
modules that the library's own authors keep (``evaluate-metric/NAME``). Imports nothing of peftkit but errors and the
registry: tasks may use it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from sklearn import metrics as sk

from peftkit.errors import HubError, RecipeError, did_you_mean
from peftkit.registry import Registry

if TYPE_CHECKING:
    import evaluate

Holds = Literal["classes", "sets", "numbers"]
METRICS: Registry[type[Score]] = Registry("metric", group="peftkit.metrics")
OF_PROBABILITIES = ("calibration_error", "loss")
"""Figures that are computed from probabilities, not from predictions; valid names, but not metrics of this module."""


class Score:
    """One metric over predictions that are "classes" (an id), "sets" (0 or 1 for every label) or "numbers"."""

    holds: ClassVar[tuple[Holds, ...]] = ("classes", "sets")
    paper: ClassVar[str] = ""

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """Its value over all rows; NaN where it is not defined."""
        raise NotImplementedError


def compute_metric(
    name: str, predictions: Any, references: Any, holds: Holds = "classes", **options: Any
) -> dict[str, float]:
    """The metric of that name over all rows; a hub module may return several values.

    Args:
        holds: what a prediction is.
        options: of the metric, as scikit-learn has them.

    Raises:
        RecipeError, HubError: as in ``check``.
    """
    predicted = np.asarray(predictions)
    if own := _own(name, holds):
        return {name: float(own.score(np.asarray(references), predicted, **options))}
    result = _from_hub(name).compute(predictions=predicted, references=references, **options) or {}
    return {key: float(value) for key, value in result.items() if isinstance(value, int | float | np.number)}


def check(name: str, holds: Holds = "classes") -> None:
    """Whether there is a metric of that name for such predictions.

    Raises:
        RecipeError: there is no such metric, or it cannot score such predictions.
        HubError: the name is not built in, and the hub cannot be asked.
    """
    if _own(name, holds) is None:
        _from_hub(name)


def load(name: str, holds: Holds = "classes", **options: Any) -> evaluate.EvaluationModule:
    """The metric of that name as a module of the evaluate library.

    Args:
        holds: what a prediction is.
        options: of ``evaluate.Metric``: ``num_process`` and ``process_id`` to gather over processes. Predictions stay
            in memory unless ``keep_in_memory=False`` says otherwise.

    Raises:
        RecipeError, HubError: as in ``check``.
    """
    own = _own(name, holds)
    if own is None:
        return _from_hub(name)
    from peftkit.evaluation.evaluate_modules import Module

    def named(predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        return compute_metric(name, predictions, references, holds, **options)

    return Module(named, holds, type(own).__doc__ or "", own.paper, **{"keep_in_memory": True, **options})


def _own(name: str, holds: Holds) -> Score | None:
    """The built-in metric of that name, or None; raises RecipeError where it cannot score such predictions."""
    if name not in METRICS:
        return None
    metric = METRICS.get(name)
    if holds not in metric.holds:
        fitting = ", ".join(other for other in METRICS if holds in METRICS.get(other).holds)
        raise RecipeError(f"metric '{name}' scores {' or '.join(metric.holds)}, not {holds}; choose from: {fitting}")
    return metric()


def _from_hub(name: str) -> evaluate.EvaluationModule:
    from huggingface_hub import constants

    hint = did_you_mean(name, [*METRICS, *OF_PROBABILITIES])
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,60}", name) or Path("evaluate-metric", name).exists():
        raise RecipeError(f"unknown metric '{name}': {hint}")
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"unknown metric '{name}': {hint} (Other evaluate modules need the hub, which is set offline.)")
    import evaluate

    try:
        return evaluate.load(f"evaluate-metric/{name}", keep_in_memory=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise HubError(
            f"unknown metric '{name}': {hint} (It is not among the hub's evaluate modules either, or the hub cannot be "
            f"reached: {type(error).__name__}: {reason})"
        ) from None


@METRICS.register("accuracy")
class Accuracy(Score):
    """Share of rows predicted exactly; of sets of labels, those that are equal."""

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """Between 0 and 1."""
        return sk.accuracy_score(references, predictions, **options)


@METRICS.register("balanced_accuracy")
class BalancedAccuracy(Score):
    """Mean over classes of the share of their rows that are predicted right."""

    holds = ("classes",)

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """Between 0 and 1."""
        present = np.unique(references)
        return sk.recall_score(references, predictions, labels=present, average="macro", zero_division=0, **options)


@METRICS.register("precision")
class Precision(Score):
    """Share of the rows given a class that have it; unweighted mean over classes."""

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """Between 0 and 1; ``average`` as in scikit-learn."""
        return sk.precision_score(references, predictions, **{"average": "macro", "zero_division": 0, **options})


@METRICS.register("recall")
class Recall(Score):
    """Share of a class's rows that are given it; unweighted mean over classes."""

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """Between 0 and 1; ``average`` as in scikit-learn."""
        return sk.recall_score(references, predictions, **{"average": "macro", "zero_division": 0, **options})


@METRICS.register("f1")
class F1(Score):
    """Harmonic mean of precision and recall; unweighted mean over classes (macro)."""

    average: ClassVar[str] = "macro"

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """Between 0 and 1; ``average`` as in scikit-learn."""
        return sk.f1_score(references, predictions, **{"average": self.average, "zero_division": 0, **options})


@METRICS.register("f1_weighted")
class F1Weighted(F1):
    """F1 averaged over classes by their rows."""

    average = "weighted"


@METRICS.register("f1_micro")
class F1Micro(F1):
    """F1 of all decisions pooled; of one label a row it is the accuracy."""

    average = "micro"


@METRICS.register("matthews_correlation")
class MatthewsCorrelation(Score):
    """Correlation of gold and predicted classes, 0 for chance whatever their shares (Gorodkin 2004 for several)."""

    holds = ("classes",)

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """Between -1 and 1."""
        return sk.matthews_corrcoef(references, predictions, **options)


@METRICS.register("exact_match")
class ExactMatch(Accuracy):
    """Share of rows whose labels are all right."""


@METRICS.register("hamming_loss")
class HammingLoss(Score):
    """Share of single label decisions that are wrong."""

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """Between 0 and 1; smaller is better."""
        return sk.hamming_loss(references, predictions, **options)


@METRICS.register("mse")
class MeanSquaredError(Score):
    """Mean squared difference."""

    holds = ("numbers",)

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """In the label's unit, squared."""
        return sk.mean_squared_error(references, predictions, **options)


@METRICS.register("mae")
class MeanAbsoluteError(Score):
    """Mean absolute difference."""

    holds = ("numbers",)

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """In the label's unit."""
        return sk.mean_absolute_error(references, predictions, **options)


@METRICS.register("r2")
class R2(Score):
    """Share of the variance that is explained; 0 for always predicting the mean."""

    holds = ("numbers",)

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """At most 1; NaN for fewer than two rows."""
        return sk.r2_score(references, predictions, **options) if len(references) > 1 else float("nan")


@METRICS.register("pearsonr")
class Pearson(Score):
    """Linear correlation."""

    holds = ("numbers",)

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """Between -1 and 1; NaN where either side is constant."""
        from scipy.stats import pearsonr

        return pearsonr(references, predictions, **options).statistic if _varies(references, predictions) else np.nan


@METRICS.register("spearmanr")
class Spearman(Score):
    """Correlation of ranks."""

    holds = ("numbers",)

    def score(self, references: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
        """Between -1 and 1; NaN where either side is constant."""
        from scipy.stats import spearmanr

        return spearmanr(references, predictions, **options).statistic if _varies(references, predictions) else np.nan


def _varies(*sides: np.ndarray) -> bool:
    return all(len(side) > 1 and np.ptp(side) > 0 for side in sides)
