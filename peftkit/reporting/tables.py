"""Terminal tables from the JSON of a run. Users' texts are printed without markup or escape sequences."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftkit.reporting import formatting

LOG_WIDTH = 140
"""Columns of tables in a log, which does not wrap lines."""


def console(*, quiet: bool = False) -> Console:
    """A console on stdout, as wide as the terminal or as a log."""
    return Console(highlight=False, quiet=quiet, width=None if sys.stdout.isatty() else LOG_WIDTH)


def table(title: str, *headings: str, left: Collection[str] = ()) -> Table:
    """An empty table; the first column and those in ``left`` are left-aligned, as texts, the others right-aligned."""
    empty = Table(title=title, title_justify="left", title_style="bold")
    for number, heading in enumerate(headings):
        empty.add_column(heading, justify="right" if number and heading not in left else "left", overflow="fold")
    return empty


def metrics(assessments: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every metric with its interval, one column per split (split → ``evaluation.assessment.assess``)."""
    level = next((one["confidence"] for one in assessments.values()), 0.95)
    headings = (f"{split} ({one['rows']:,} rows)" for split, one in assessments.items())
    results = table(f"Results with {level:.0%} confidence intervals", "", *headings)
    for name in dict.fromkeys(name for one in assessments.values() for name in one["metrics"]):
        cells = [one["metrics"].get(name) for one in assessments.values()]
        results.add_row(formatting.name(name), *(formatting.with_interval(cell) if cell else "–" for cell in cells))
    return results


def baselines(assessment: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Group:
    """The result next to the baselines, and whether finetuning helped."""
    used = [entry for entry in entries if entry["metrics"]]
    names = (formatting.name(entry["name"]) for entry in used)
    results = table(f"Did finetuning help? ({assessment['split']})", "", "finetuned", *names)
    results.columns[1].style = "bold"
    for name, own in assessment["metrics"].items():
        others = [entry["metrics"].get(name) for entry in used]
        if any(other is not None for other in others):
            results.add_row(formatting.name(name), formatting.figure(own["value"]), *map(formatting.figure, others))
    lines: list[RenderableType] = [results] if used else []
    for entry in entries:
        remark = "; ".join(filter(None, (entry["verdict"], entry["note"])))
        if remark:
            lines.append(Text(f"  {formatting.name(entry['name'])}: {formatting.plain(remark)}"))
    return Group(*lines)


def trainable(parts: Sequence[Mapping[str, Any]]) -> Table:
    """The parts of the model: ``part``, ``parameters``, ``trainable``, ``dtype``, ``bytes`` of each."""
    total = sum(part["parameters"] for part in parts)
    learned = sum(part["parameters"] for part in parts if part["trainable"])
    title = f"Trainable: {learned:,} of {total:,} parameters ({learned / max(1, total):.2%})"
    results = table(title, "part", "parameters", "dtype", "memory", "", left=("",))
    for part in parts:
        state = Text("trained", style="bold green") if part["trainable"] else Text("frozen", style="dim")
        results.add_row(part["part"], f"{part['parameters']:,}", part["dtype"], formatting.size(part["bytes"]), state)
    return results


def plan(comparison: Mapping[str, Any]) -> RenderableType:
    """Planned and measured figures (``planning.prediction``), or why nothing was planned."""
    if "beside" not in comparison:
        return Text(f"  not planned: {formatting.plain(comparison['reason'])}", style="dim")
    title = f"Planned and measured (planned peak: {comparison['plan']['peak']['phase']})"
    results = table(title, "", "planned", "measured", "error")
    for row in comparison["beside"]:
        cells = (formatting.quantity(row["figure"], row[name]) for name in ("planned", "measured"))
        error = "–" if row["off"] is None else f"{row['off']:+.1%}"
        results.add_row(formatting.name(row["figure"].removesuffix("_bytes")), *cells, error)
    return results


def cleaning(steps: Sequence[Mapping[str, Any]]) -> Table:
    """Cleaning steps: ``name``, ``split``, ``action``, ``rows``, ``examples`` of each."""
    results = table("Cleaning", "step", "split", "rows", "examples", left=("split", "examples"))
    for step in steps:
        examples = "; ".join(formatting.plain(example, 60) for example in step["examples"][:2])
        action = f"{step['rows']:,} {step['action']}" if step["rows"] else "none"
        results.add_row(formatting.name(step["name"]), step["split"], action, Text(examples))
    return results


def splits(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows, tokens and truncation per split, from mappings with the same keys."""
    results = table("Data", *(formatting.name(heading) for heading in rows[0]))
    for row in rows:
        cells = (f"{cell:,}" if isinstance(cell, int) else formatting.plain(cell) for cell in row.values())
        results.add_row(*map(Text, cells))
    return results
