"""Finished runs compared: metrics with intervals, cost, and which differences are significant."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from peftkit.errors import RecipeError, did_you_mean
from peftkit.evaluation.direction import greater_is_better
from peftkit.evaluation.intervals import wilson
from peftkit.experiments import scores
from peftkit.experiments.scores import Scored
from peftkit.reporting import formatting
from peftkit.runs import folder as folders
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import TaskInfo

COSTS = {
    "parameters": "trained_parameters",
    "time": "seconds",
    "memory": "peak_memory_bytes",
    "size": "saved_bytes",
}
"""Cost → the training figure that measures it."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """One variant: its finished runs, one per seed, and the errors of the others."""

    label: str
    runs: Sequence[Path] = ()
    status: str = "done"
    messages: Sequence[str] = ()


@dataclass(frozen=True)
class Measured:
    """A finished run's metrics and predictions."""

    path: Path
    metrics: Mapping[str, Any]
    assessment: Mapping[str, Any]
    scored: Scored
    saved_bytes: int


def tabulate(
    name: str,
    groups: Sequence[Group],
    *,
    metric: str | None = None,
    against: str | None = None,
    cost: str = "parameters",
) -> dict[str, Any]:
    """The comparison as JSON values.

    Args:
        metric: the metric to compare; None for the task's own.
        against: label of the variant to compare the others with; None for the best.
        cost: a key of COSTS, by which the cheapest is chosen.

    Returns:
        ``name``, ``metric``, ``greater_is_better``, ``split``, ``rows``, ``confidence``, ``against``, ``cost``,
        ``variants`` and ``baselines`` (one mapping each), and ``pick``, a sentence.

    Raises:
        RecipeError: unknown metric, variant or cost.
    """
    check_names(groups, against=against, cost=cost)
    listed = [{"variant": group.label, "status": group.status, "said": list(group.messages)} for group in groups]
    split, measured = _measure(groups)
    if not measured:
        return {"name": name, "metric": metric, "variants": listed, "baselines": [], "pick": "No variant has finished."}
    first = next(iter(measured.values()))[0]
    metric = metric or _own_metric(first.path)
    if metric not in first.metrics[split]:
        raise RecipeError(f"--metric: unknown metric '{metric}': {did_you_mean(metric, first.metrics[split])}")
    confidence = first.assessment["confidence"]
    rows = {label: _row(label, runs, split, metric, confidence) for label, runs in measured.items()}
    best = _best(rows, metric)
    reference = against if against in measured else best

    @cache
    def compared(label: str, other: str) -> Mapping[str, Any]:
        if label == other:
            return {}
        scored, others = ([run.scored for run in measured[one]] for one in (label, other))
        return scores.compare(scored, others, metric, confidence) or {}

    for label, row in rows.items():
        result = compared(label, reference)
        row |= {name: result.get(name) for name in ("difference", "p_value", "test")}
        row |= {f"difference_{limit}": result.get(limit) for limit in ("low", "high")}
    # where the difference is undetermined, the variant counts as worse than the best
    close = [label for label in rows if label == best or compared(label, best).get("p_value", 0.0) >= 1 - confidence]
    return {
        "name": name,
        "metric": metric,
        "greater_is_better": greater_is_better(metric),
        "split": split,
        "rows": len(first.scored.rows),
        "confidence": confidence,
        "against": reference,
        "best": best,
        "cost": cost,
        "variants": [entry | rows.get(group.label, {}) for group, entry in zip(groups, listed)],
        "baselines": _baselines(measured[best][0], metric, confidence, best),
        "pick": _pick([rows[label] for label in close], rows[best], metric, cost),
    }


def check_names(groups: Sequence[Group], *, against: str | None, cost: str) -> None:
    """Raises RecipeError for an unknown label or cost, before anything is trained."""
    labels = [group.label for group in groups]
    if against is not None and against not in labels:
        raise RecipeError(f"--against: no variant '{against}': {did_you_mean(against, labels)}")
    if cost not in COSTS:
        raise RecipeError(f"--cost: unknown cost '{cost}': {did_you_mean(cost, COSTS)}")


def _measure(groups: Sequence[Group]) -> tuple[str, dict[str, list[Measured]]]:
    runs = [run for group in groups for run in group.runs]
    if not runs:
        return "test", {}
    split = "test" if "test" in _json(runs[0] / folders.METRICS) else "validation"
    return split, {group.label: [_measured(run, split) for run in group.runs] for group in groups if group.runs}


def _measured(run: Path, split: str) -> Measured:
    recipe = Recipe.from_yaml(run / folders.RECIPE)
    saved = run / recipe.method.saves
    return Measured(
        run,
        _json(run / folders.METRICS),
        _json(run / "assessment.json").get(split, {}),
        scores.read(run, split),
        sum(file.stat().st_size for file in saved.glob("*.safetensors")),
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _own_metric(run: Path) -> str:
    recipe, info = Recipe.from_yaml(run / folders.RECIPE), TaskInfo(**_json(run / folders.INFO))
    return head_of(info, recipe.task).best_metric


def _row(label: str, runs: Sequence[Measured], split: str, metric: str, confidence: float) -> Row:
    values = [run.metrics[split].get(metric) for run in runs]
    known = [value for value in values if value is not None]
    training = [run.metrics["training"] for run in runs]
    if len(runs) == 1:
        entry = runs[0].assessment["metrics"][metric]
        limits = (entry["low"], entry["high"])
    else:
        limits = scores.interval([run.scored for run in runs], metric, confidence) or (None, None)
    return {
        "variant": label,
        "runs": [str(run.path) for run in runs],
        "values": values,
        "value": statistics.fmean(known) if known else None,
        "deviation": statistics.stdev(known) if len(known) > 1 else None,
        "low": limits[0],
        "high": limits[1],
        "trained_parameters": training[0]["trained_parameters"],
        "seconds": statistics.fmean(one["seconds"] for one in training),
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in training),
        "saved_bytes": runs[0].saved_bytes,
    }


def _best(rows: Mapping[str, Row], metric: str) -> str:
    better = max if greater_is_better(metric) else min
    known = {label: row["value"] for label, row in rows.items() if row["value"] is not None}
    return better(known, key=known.__getitem__) if known else next(iter(rows))


def _baselines(best: Measured, metric: str, confidence: float, label: str) -> list[Row]:
    """The baselines of the best variant's first run, with p-values where computed for this metric."""
    file = best.path / "baselines.json"
    rows = []
    for entry in _json(file) if file.is_file() else []:
        value, compared = entry["metrics"].get(metric), entry["comparison"] or {}
        row = {"variant": formatting.name(entry["name"]), "value": value, "note": entry["note"], "of": label}
        row |= dict.fromkeys(("low", "high", "difference", "p_value"))
        if metric in {"accuracy", "loss"} and compared:
            row |= {"difference": -compared["difference"], "p_value": compared["p_value"]}
        if metric == "accuracy" and value is not None and entry["rows"]:
            row["low"], row["high"] = wilson(value * entry["rows"], entry["rows"], confidence)
        rows.append(row)
    return rows


def _pick(candidates: Sequence[Row], best: Row, metric: str, cost: str) -> str:
    """The cheapest variant that is not significantly worse than the best, as a sentence."""
    key = COSTS[cost]
    row = min(candidates, key=lambda one: (one[key], one["seconds"]))
    price = f"{row['trained_parameters']:,} trained parameters, {row['seconds']:.1f} s of training"
    score = f"{formatting.name(metric)} {formatting.figure(row['value'])}"
    if row["variant"] == best["variant"]:
        return f"Pick {row['variant']} ({price}): {score} is the best; every cheaper variant is significantly worse."
    return (
        f"Pick {row['variant']} ({price}): {score} is not significantly worse than "
        f"{formatting.figure(best['value'])} of {best['variant']}, the best."
    )
