"""A split's predictions assessed, as JSON: what the end of training and ``peftkit evaluate`` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peftkit.evaluation import intervals, resampling
from peftkit.evaluation.direction import greater_is_better
from peftkit.evaluation.samples import WrittenTexts
from peftkit.schema.baseline import BaselineResult
from peftkit.schema.head import Head, Outputs
from peftkit.schema.recipe import EvaluationConfig


def assess(
    head: Head,
    outputs: Outputs,
    rows: Any,
    evaluation: EvaluationConfig,
    *,
    split: str = "test",
    seed: int = 0,
    written: WrittenTexts | None = None,
) -> dict[str, Any]:
    """Assesses one split.

    Args:
        outputs: what ``head.outputs`` returned for the split, gathered in order.
        rows: the split's canonical rows, a ``datasets.Dataset`` or a list.
        seed: of the bootstrap.
        written: what the model wrote for some of the rows; its metrics are among the others.

    Returns:
        ``split``, ``rows``, ``problem_type``, ``labels``, ``confidence`` (the intervals' level) and ``metrics``: name →
        {value, low, high, interval, greater_is_better}, low and high None where no interval is known; and what
        ``head.details`` adds.
    """
    values = head.metrics(outputs, evaluation)
    limits = _intervals(head, outputs, evaluation.confidence, seed)
    if written is not None:
        statistics, count = written.statistics(), len(written.rows)
        values |= statistics(np.arange(count))
        drawn = intervals.bootstrap(statistics, count, confidence=evaluation.confidence, seed=seed)
        limits |= {name: (*pair, "bootstrap") for name, pair in drawn.items()}
    return {
        "split": split,
        "rows": len(outputs["loss"]),
        "problem_type": head.info.problem_type,
        "labels": list(head.info.labels),
        "confidence": evaluation.confidence,
        "metrics": {name: _entry(name, value, limits) for name, value in values.items()},
        **head.details(outputs, rows, evaluation),
    }


def compare(name: str, baseline: BaselineResult, head: Head, outputs: Outputs, confidence: float) -> dict[str, Any]:
    """A baseline as JSON, compared with the trained model's answers for the same rows.

    Args:
        outputs: of the trained model for all rows of the split.

    Returns:
        ``name``, ``metrics``, ``note``, ``rows`` (scored), ``comparison`` (the head's test; None where it has none, or
        the baseline was not computed) and ``verdict``, a sentence or the empty string.
    """
    rows, comparison, verdict = None, None, ""
    if baseline.outputs:
        rows = np.arange(len(outputs["loss"])) if baseline.rows is None else baseline.rows
        same = {key: values[rows] for key, values in outputs.items()}
        comparison, verdict = head.compare(same, baseline.outputs, name, confidence)
    return {
        "name": name,
        "metrics": baseline.metrics,
        "note": baseline.note,
        "rows": None if rows is None else len(rows),
        "comparison": comparison,
        "verdict": verdict,
    }


def _entry(name: str, value: float, limits: Mapping[str, tuple[float, float, str]]) -> dict[str, Any]:
    entry = dict(zip(("low", "high", "interval"), limits.get(name, (None,) * 3)))
    return {"value": value if np.isfinite(value) else None, **entry, "greater_is_better": greater_is_better(name)}


def _intervals(head: Head, outputs: Outputs, confidence: float, seed: int) -> dict[str, tuple[float, float, str]]:
    """(low, high, kind) by metric: Wilson's for shares of rows, the bootstrap for the rest."""
    losses, statistics = resampling.of_loss(outputs["loss"], outputs["weight"]), head.statistics(outputs)
    rows = len(outputs["loss"])
    drawn = intervals.bootstrap(
        lambda chosen: {**(statistics(chosen) if statistics else {}), **losses(chosen)},
        rows, confidence=confidence, seed=seed,
    )  # fmt: skip
    limits = {name: (*pair, "bootstrap") for name, pair in drawn.items()}
    right = head.right(outputs)
    if right is not None and rows:
        wilson = (*intervals.wilson(right.sum(), rows, confidence), "wilson")
        limits |= dict.fromkeys(("accuracy", "exact_match"), wilson)
    return limits
