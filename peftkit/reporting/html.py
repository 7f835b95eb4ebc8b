"""The report of a run as one HTML file: nothing is fetched, no script runs, every text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from peftkit.reporting import formatting, tables


@dataclass(frozen=True)
class Report:
    """What stands in the report; all of it is JSON-able, and whatever is empty is left out."""

    title: str
    recipe: str
    """The recipe as YAML."""
    summary: str = ""
    """One sentence: base, method, data."""
    assessments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Split → ``evaluation.assessment.assess``; the test split, or else the last, is shown in detail."""
    baselines: Sequence[Mapping[str, Any]] = ()
    """``evaluation.baselines.beside`` of each."""
    splits: Sequence[Mapping[str, Any]] = ()
    """One mapping a split, all with the same keys: rows, tokens, truncated …"""
    cleaning: Sequence[Mapping[str, Any]] = ()
    """``name``, ``split``, ``action``, ``rows``, ``examples`` of each step."""
    trainable: Sequence[Mapping[str, Any]] = ()
    """``part``, ``parameters``, ``trainable``, ``dtype``, ``bytes`` of each part of the model."""
    log: Sequence[Mapping[str, Any]] = ()
    """Lines of metrics.jsonl."""
    best_metric: str | None = None
    """The validation figure that is plotted."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Generated texts, heading → text."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """``planning.prediction.beside``: planned and measured."""
    notes: Sequence[str] = ()
    """What was decided and why."""
    commands: Sequence[tuple[str, str]] = ()
    """(what it does, the command) to type next."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Versions, machine, seed."""


def render(report: Report, plots: Mapping[str, bytes] | None = None) -> str:
    """The whole page; ``plots`` are those of ``figures_of``, where they are drawn already."""
    return environment().get_template("report.html").render(**_context(report, plots), whole=True)


def fragment(report: Report) -> str:
    """The page's inside, for a notebook."""
    return environment().get_template("report.html").render(**_context(report, None), whole=False)


def write(report: Report, path: str | Path, plots: Mapping[str, bytes] | None = None) -> Path:
    """Writes the page; see ``render``."""
    path = Path(path)
    path.write_text(render(report, plots), encoding="utf-8")
    return path


def figures_of(report: Report) -> dict[str, bytes]:
    """The plots of a run by file name, as PNG: learning curves, confusion matrix, reliability or scatter."""
    from peftkit.reporting import plots  # matplotlib is needed when a run has ended

    made = {}
    if any("loss" in row for row in report.log):
        made["learning_curves.png"] = plots.png(plots.learning_curves(report.log, report.best_metric))
    shown_one = main_assessment(report)
    if shown_one and "confusion" in shown_one:
        made["confusion_matrix.png"] = plots.png(plots.confusion_matrix(shown_one["confusion"], shown_one["labels"]))
    if shown_one and shown_one.get("calibration", {}).get("bins"):
        error = shown_one["metrics"].get("calibration_error", {}).get("value")
        made["reliability.png"] = plots.png(plots.reliability_diagram(shown_one["calibration"]["bins"], error))
    if shown_one and "pairs" in shown_one:
        made["scatter.png"] = plots.png(plots.scatter(shown_one["pairs"], shown_one["labels"][0]))
    return made


def main_assessment(report: Report) -> Mapping[str, Any] | None:
    """The assessment shown in detail: of the test split, or else the last."""
    if not report.assessments:
        return None
    return report.assessments.get("test") or list(report.assessments.values())[-1]


def _context(report: Report, plots: Mapping[str, bytes] | None) -> dict[str, Any]:
    images = {
        Path(name).stem: f"data:image/png;base64,{base64.b64encode(data).decode()}"
        for name, data in (figures_of(report) if plots is None else plots).items()
    }
    return {"report": report, "main": main_assessment(report), "images": images}


def environment() -> Environment:
    """Jinja's environment over the templates of this package: every text is escaped, a missing value is an error."""
    made = Environment(
        loader=PackageLoader("peftkit.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "figure": formatting.figure, "interval": formatting.with_interval, "words": formatting.name,
        "count": formatting.count, "size": formatting.size, "plain": formatting.plain,
        "answer": tables.answer, "place": tables.place,
        "quantity": lambda value, name: formatting.quantity(name, value),
    }  # fmt: skip
    return made
