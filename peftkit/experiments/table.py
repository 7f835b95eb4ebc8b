"""Finished runs compared: metrics with intervals, cost, and which differences are significant.

table = tabulate("bbc", [Group("lora", [run0, run1]), Group("frozen", [run2, run3])])
table["pick"]        # "Pick frozen: …"
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    messages: Sequence[str] = field(default_factory=tuple)


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
    split, measured = _measure(groups)
    if not measured:
        return {"name": name, "metric": metric, "variants": [_not_done(group) for group in groups], "baselines": [],
                "pick": "No variant has finished."}  # fmt: skip
    first = next(iter(measured.values()))[0]
    metric = metric or _own_metric(first.path)
    if metric not in first.metrics[split]:
        raise RecipeError(f"--metric: unknown metric '{metric}': {did_you_mean(metric, first.metrics[split])}")
    confidence = first.assessment["confidence"]
    rows = {label: _row(label, runs, split, metric, confidence) for label, runs in measured.items()}
    best = _best(rows, metric)
    reference = against if against in measured else best
    for label in measured:
        rows[label] |= _compared(measured[label], measured[reference], metric, confidence, same=label == reference)
    worse = {
        label for label in measured if _worse(measured[label], measured[best], metric, confidence, same=label == best)
    }
    listed = [{**_not_done(group), **rows.get(group.label, {})} for group in groups]
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
        "variants": listed,
        "baselines": _baselines(measured[best][0], metric, confidence, best),
        "pick": _pick({label: rows[label] for label in measured if label not in worse}, rows[best], metric, cost),
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


def _not_done(group: Group) -> Row:
    return {"variant": group.label, "status": group.status, "said": list(group.messages)}


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
    sign = 1 if greater_is_better(metric) else -1
    known = {label: row["value"] for label, row in rows.items() if row["value"] is not None}
    return max(known, key=lambda label: sign * known[label]) if known else next(iter(rows))


def _compared(
    runs: Sequence[Measured], reference: Sequence[Measured], metric: str, confidence: float, *, same: bool
) -> Row:
    """Difference from the reference and its p-value."""
    result = None
    if not same:
        result = scores.compare([run.scored for run in runs], [run.scored for run in reference], metric, confidence)
    names = {"difference": "difference", "difference_low": "low", "difference_high": "high", "p_value": "p_value",
             "test": "test"}  # fmt: skip
    return {name: result[key] if result else None for name, key in names.items()}


def _worse(runs: Sequence[Measured], best: Sequence[Measured], metric: str, confidence: float, *, same: bool) -> bool:
    """Whether it is significantly worse than the best; undetermined counts as worse."""
    if same:
        return False
    p_value = _compared(runs, best, metric, confidence, same=False)["p_value"]
    return p_value is None or bool(p_value < 1 - confidence)


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


def _pick(candidates: Mapping[str, Row], best: Row, metric: str, cost: str) -> str:
    """The cheapest variant that is not significantly worse than the best, as a sentence."""
    key = COSTS[cost]
    row = min(candidates.values(), key=lambda one: (one[key], one["seconds"]))
    price = f"{row['trained_parameters']:,} trained parameters, {row['seconds']:.1f} s of training"
    score = f"{formatting.name(metric)} {formatting.figure(row['value'])}"
    if row["variant"] == best["variant"]:
        return f"Pick {row['variant']} ({price}): {score} is the best; every cheaper variant is significantly worse."
    return (
        f"Pick {row['variant']} ({price}): {score} is not significantly worse than "
        f"{formatting.figure(best['value'])} of {best['variant']}, the best."
    )
