"""The report of a run as one self-contained HTML file: no scripts, no network, every text escaped."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from peftkit.reporting import formatting


@dataclass(frozen=True)
class Report:
    """The content of a report, as JSON values; empty parts are omitted."""

    title: str
    recipe: str
    """The recipe as YAML."""
    summary: str = ""
    assessments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Split → ``evaluation.assessment.assess``; the test split, or else the last, is shown in detail."""
    baselines: Sequence[Mapping[str, Any]] = ()
    splits: Sequence[Mapping[str, Any]] = ()
    """One mapping per split with the same keys: rows, tokens, truncated …"""
    cleaning: Sequence[Mapping[str, Any]] = ()
    """``name``, ``split``, ``action``, ``rows``, ``examples`` of each step."""
    trainable: Sequence[Mapping[str, Any]] = ()
    """``part``, ``parameters``, ``trainable``, ``dtype``, ``bytes`` of each part of the model."""
    choices: Sequence[Mapping[str, Any]] = ()
    """``schema.automatic.Choice`` of each field that the run chose."""
    log: Sequence[Mapping[str, Any]] = ()
    """Lines of metrics.jsonl."""
    best_metric: str | None = None
    """The validation metric to plot."""
    samples: Sequence[Mapping[str, Any]] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    """``planning.prediction.compare_with_measured``."""
    notes: Sequence[str] = ()
    commands: Sequence[tuple[str, str]] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)


def render(report: Report, plots: Mapping[str, bytes] | None = None, *, standalone: bool = True) -> str:
    """The page, or its body for a notebook; ``plots`` are those of ``plots_of``, if drawn already."""
    images = {
        Path(name).stem: data_uri(image) for name, image in (plots_of(report) if plots is None else plots).items()
    }
    template = environment().get_template("report.html")
    return template.render(report=report, main=main_assessment(report), images=images, standalone=standalone)


def plots_of(report: Report) -> dict[str, bytes]:
    """PNG plots by file name: learning curves, confusion matrix, reliability, or scatter."""
    from peftkit.reporting import plots  # imports matplotlib

    figures, main = {}, main_assessment(report) or {}
    if any("loss" in row for row in report.log):
        figures["learning_curves.png"] = plots.learning_curves(report.log, report.best_metric)
    if "confusion" in main:
        figures["confusion_matrix.png"] = plots.confusion_matrix(main["confusion"], main["labels"])
    if bins := main.get("calibration", {}).get("bins"):
        error = main["metrics"].get("calibration_error", {}).get("value")
        figures["reliability.png"] = plots.reliability_diagram(bins, error)
    if "pairs" in main:
        figures["scatter.png"] = plots.scatter(main["pairs"], main["labels"][0])
    if report.choices:
        figures["choices.png"] = plots.choices(report.choices)
    return {name: plots.png(figure) for name, figure in figures.items()}


def data_uri(image: bytes) -> str:
    """A PNG as the source of an image in a page."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def main_assessment(report: Report) -> Mapping[str, Any] | None:
    """The assessment shown in detail: the test split's, or else the last."""
    if not report.assessments:
        return None
    return report.assessments.get("test") or list(report.assessments.values())[-1]


@functools.cache
def environment() -> Environment:
    """The Jinja environment of the templates: texts are escaped, a missing value is an error."""
    jinja = Environment(
        loader=PackageLoader("peftkit.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    jinja.filters |= {
        "figure": formatting.figure, "interval": formatting.with_interval, "words": formatting.name,
        "count": "{:,}".format, "size": formatting.size, "plain": formatting.plain, "answer": formatting.answer,
        "place": formatting.place, "quantity": lambda value, name: formatting.quantity(name, value),
    }  # fmt: skip
    return jinja
