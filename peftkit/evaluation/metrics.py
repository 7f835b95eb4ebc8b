"""Metrics by name, over scikit-learn or SciPy; no network is needed.

    compute_metric("f1", predictions=[0, 1], references=[0, 0])  # {"f1": 0.333…}

A name that is not here is looked up among the modules that the evaluate library's own authors keep on the hub
(``evaluate-metric/NAME``). Imports nothing of peftkit but errors and the registry: tasks may use it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
"""Valid names of metrics that are computed from probabilities, not from predictions, and so not here."""


class Score:
    """One metric over predictions that are "classes" (an id), "sets" (0 or 1 for every label) or "numbers"."""

    holds: ClassVar[tuple[Holds, ...]] = ("classes", "sets")

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        """Its value over all rows; NaN where it is not defined."""
        raise NotImplementedError


def compute_metric(name: str, predictions: Any, references: Any, holds: Holds = "classes") -> dict[str, float]:
    """The metric of that name over all rows; a hub module may return several values.

    Args:
        holds: what a prediction is.

    Raises:
        RecipeError: there is no such metric, or it cannot score such predictions.
        HubError: the name is not built in, and the hub cannot be asked.
    """
    if name not in METRICS:
        result = _from_hub(name).compute(predictions=predictions, references=references) or {}
        return {key: float(value) for key, value in result.items() if isinstance(value, int | float | np.number)}
    metric = METRICS.get(name)
    if holds not in metric.holds:
        fitting = ", ".join(other for other in METRICS if holds in METRICS.get(other).holds)
        raise RecipeError(f"metric '{name}' scores {' or '.join(metric.holds)}, not {holds}; choose from: {fitting}")
    return {name: float(metric().score(np.asarray(references), np.asarray(predictions)))}


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


def _register(name: str, function: Callable[..., float], *holds: Holds, **options: Any) -> None:
    """Registers a function of references and predictions, called with fixed options."""

    def score(self: Score, references: np.ndarray, predictions: np.ndarray) -> float:
        return function(references, predictions, **options)

    METRICS.register(name)(type(name, (Score,), {"holds": holds, "score": score}))


def _balanced_accuracy(references: np.ndarray, predictions: np.ndarray) -> float:
    """Mean recall of the classes that occur; scikit-learn's own warns of predicted classes that do not."""
    present = np.unique(references)
    return sk.recall_score(references, predictions, labels=present, average="macro", zero_division=0)


def _r2(references: np.ndarray, predictions: np.ndarray) -> float:
    return sk.r2_score(references, predictions) if len(references) > 1 else np.nan


def _correlation(references: np.ndarray, predictions: np.ndarray, kind: str) -> float:
    """SciPy's correlation of that name; NaN where either side is constant."""
    from scipy import stats

    varied = all(len(side) > 1 and np.ptp(side) > 0 for side in (references, predictions))
    return getattr(stats, kind)(references, predictions).statistic if varied else np.nan


_register("accuracy", sk.accuracy_score, "classes", "sets")  # of sets: the share that is right in every label
_register("exact_match", sk.accuracy_score, "classes", "sets")
_register("hamming_loss", sk.hamming_loss, "classes", "sets")
_register("precision", sk.precision_score, "classes", "sets", average="macro", zero_division=0)
_register("recall", sk.recall_score, "classes", "sets", average="macro", zero_division=0)
_register("f1", sk.f1_score, "classes", "sets", average="macro", zero_division=0)
_register("f1_weighted", sk.f1_score, "classes", "sets", average="weighted", zero_division=0)
_register("f1_micro", sk.f1_score, "classes", "sets", average="micro", zero_division=0)
_register("balanced_accuracy", _balanced_accuracy, "classes")
_register("matthews_correlation", sk.matthews_corrcoef, "classes")  # for several classes: Gorodkin 2004
_register("mse", sk.mean_squared_error, "numbers")
_register("mae", sk.mean_absolute_error, "numbers")
_register("r2", _r2, "numbers")
_register("pearsonr", _correlation, "numbers", kind="pearsonr")
_register("spearmanr", _correlation, "numbers", kind="spearmanr")
