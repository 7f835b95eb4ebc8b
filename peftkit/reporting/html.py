"""The report of a run as one self-contained HTML file: no scripts, no network, every text escaped."""

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
    """The content of a report, as JSON values; empty parts are omitted."""

    title: str
    recipe: str
    """The recipe as YAML."""
    summary: str = ""
    """One sentence: base, method, data."""
    assessments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Split → ``evaluation.assessment.assess``; the test split, or else the last, is shown in detail."""
    baselines: Sequence[Mapping[str, Any]] = ()
    """One entry per baseline, with its comparison."""
    splits: Sequence[Mapping[str, Any]] = ()
    """One mapping per split with the same keys: rows, tokens, truncated …"""
    cleaning: Sequence[Mapping[str, Any]] = ()
    """``name``, ``split``, ``action``, ``rows``, ``examples`` of each step."""
    trainable: Sequence[Mapping[str, Any]] = ()
    """``part``, ``parameters``, ``trainable``, ``dtype``, ``bytes`` of each part of the model."""
    log: Sequence[Mapping[str, Any]] = ()
    """Lines of metrics.jsonl."""
    best_metric: str | None = None
    """The validation metric to plot."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Generated texts, heading → text."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """``planning.prediction.compare_with_measured``."""
    notes: Sequence[str] = ()
    """Decisions and their reasons."""
    commands: Sequence[tuple[str, str]] = ()
    """(description, command) of possible next steps."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Versions, machine, seed."""


def render(report: Report, plots: Mapping[str, bytes] | None = None) -> str:
    """The complete page; ``plots`` are those of ``plots_of``, if drawn already."""
    return environment().get_template("report.html").render(**_context(report, plots), standalone=True)


def fragment(report: Report) -> str:
    """The body of the page, for a notebook."""
    return environment().get_template("report.html").render(**_context(report, None), standalone=False)


def write(report: Report, path: str | Path, plots: Mapping[str, bytes] | None = None) -> Path:
    """Writes the page; see ``render``."""
    path = Path(path)
    path.write_text(render(report, plots), encoding="utf-8")
    return path


def plots_of(report: Report) -> dict[str, bytes]:
    """PNG plots by file name: learning curves, confusion matrix, reliability, or scatter."""
    from peftkit.reporting import plots  # imports matplotlib

    images = {}
    if any("loss" in row for row in report.log):
        images["learning_curves.png"] = plots.png(plots.learning_curves(report.log, report.best_metric))
    assessment = main_assessment(report)
    if assessment and "confusion" in assessment:
        images["confusion_matrix.png"] = plots.png(
            plots.confusion_matrix(assessment["confusion"], assessment["labels"])
        )
    if assessment and assessment.get("calibration", {}).get("bins"):
        error = assessment["metrics"].get("calibration_error", {}).get("value")
        images["reliability.png"] = plots.png(plots.reliability_diagram(assessment["calibration"]["bins"], error))
    if assessment and "pairs" in assessment:
        images["scatter.png"] = plots.png(plots.scatter(assessment["pairs"], assessment["labels"][0]))
    return images


def main_assessment(report: Report) -> Mapping[str, Any] | None:
    """The assessment shown in detail: the test split's, or else the last."""
    if not report.assessments:
        return None
    return report.assessments.get("test") or list(report.assessments.values())[-1]


def _context(report: Report, plots: Mapping[str, bytes] | None) -> dict[str, Any]:
    images = {
        Path(name).stem: f"data:image/png;base64,{base64.b64encode(data).decode()}"
        for name, data in (plots_of(report) if plots is None else plots).items()
    }
    return {"report": report, "main": main_assessment(report), "images": images}


def environment() -> Environment:
    """The Jinja environment of the templates: texts are escaped, a missing value is an error."""
    jinja = Environment(
        loader=PackageLoader("peftkit.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    jinja.filters |= {
        "figure": formatting.figure, "interval": formatting.with_interval, "words": formatting.name,
        "count": formatting.count, "size": formatting.size, "plain": formatting.plain,
        "answer": tables.answer, "place": tables.place,
        "quantity": lambda value, name: formatting.quantity(name, value),
    }  # fmt: skip
    return jinja
