"""Terminal tables from the JSON of a run. Users' texts are printed without markup or escape sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftkit.reporting import formatting


def metrics(assessments: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every metric with its interval, one column per split.

    Args:
        assessments: split → what ``evaluation.assessment.assess`` returns.
    """
    level = next((one["confidence"] for one in assessments.values()), 0.95)
    table = _table(f"Results with {level:.0%} confidence intervals")
    table.add_column("")
    for split, one in assessments.items():
        table.add_column(f"{split} ({one['rows']:,} rows)", justify="right")
    for name in dict.fromkeys(name for one in assessments.values() for name in one["metrics"]):
        cells = [one["metrics"].get(name) for one in assessments.values()]
        table.add_row(formatting.name(name), *(formatting.with_interval(cell) if cell else "–" for cell in cells))
    return table


def baselines(assessment: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Group:
    """The result next to the baselines, and whether finetuning helped."""
    table = _table(f"Did finetuning help? ({assessment['split']})")
    table.add_column("")
    table.add_column("finetuned", justify="right", style="bold")
    used = [entry for entry in entries if entry["metrics"]]
    for entry in used:
        table.add_column(formatting.name(entry["name"]), justify="right")
    for name, own in assessment["metrics"].items():
        others = [entry["metrics"].get(name) for entry in used]
        if any(other is not None for other in others):
            table.add_row(formatting.name(name), formatting.figure(own["value"]), *map(formatting.figure, others))
    lines: list[RenderableType] = [table] if used else []
    for entry in entries:
        remark = "; ".join(filter(None, (entry["verdict"], entry["note"])))
        if remark:
            lines.append(Text(f"  {formatting.name(entry['name'])}: {formatting.plain(remark)}"))
    return Group(*lines)


def per_class(assessment: Mapping[str, Any]) -> Table:
    """Precision, recall and F1 of every class."""
    table = _table(f"By class ({assessment['split']})")
    table.add_column("")
    for heading in ("precision", "recall", "f1", "rows", "predicted"):
        table.add_column(heading, justify="right")
    for row in assessment["per_class"]:
        scores = (formatting.figure(row[name]) for name in ("precision", "recall", "f1"))
        table.add_row(
            Text(formatting.plain(row["label"], 40)),
            *scores,
            formatting.count(row["rows"]),
            formatting.count(row["predicted"]),
        )
    return table


def confusion(assessment: Mapping[str, Any], most: int = 12) -> Table | None:
    """Gold by predicted counts; None without classes or with more than ``most``."""
    labels = assessment["labels"]
    if "confusion" not in assessment or len(labels) > most:
        return None
    table = _table(f"Confusion ({assessment['split']}): gold in rows, predicted in columns")
    table.add_column("")
    for label in labels:
        table.add_column(Text(formatting.plain(label, 14)), justify="right")
    for number, (label, counts) in enumerate(zip(labels, assessment["confusion"])):
        cells = [
            Text(formatting.count(value), style="bold" if column == number else "")
            for column, value in enumerate(counts)
        ]
        table.add_row(Text(formatting.plain(label, 24)), *cells)
    return table


def mistakes(assessment: Mapping[str, Any], most: int = 5) -> Table:
    """The most confident wrong predictions, or the largest errors."""
    table = _table(f"Worst mistakes ({assessment['split']})")
    rows = assessment["mistakes"][:most]
    numbers = any("error" in row for row in rows)
    for heading in ("gold", "predicted", "error" if numbers else "confidence", "source", "text"):
        table.add_column(heading, overflow="fold" if heading == "text" else "ellipsis")
    for row in rows:
        score = formatting.figure(row["error"]) if numbers else f"{row['confidence']:.0%}"
        table.add_row(Text(answer(row["gold"])), Text(answer(row["predicted"])), score, Text(place(row)),
                      Text(formatting.plain(row["text"], 120)))  # fmt: skip
    return table


def trainable(parts: Sequence[Mapping[str, Any]]) -> Table:
    """The parts of the model: ``part``, ``parameters``, ``trainable``, ``dtype``, ``bytes`` of each."""
    total = sum(part["parameters"] for part in parts)
    learned = sum(part["parameters"] for part in parts if part["trainable"])
    share = learned / total if total else 0.0
    table = _table(f"Trainable: {learned:,} of {total:,} parameters ({share:.2%})")
    table.add_column("part")
    for heading in ("parameters", "dtype", "memory"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for part in parts:
        state = Text("trained", style="bold green") if part["trainable"] else Text("frozen", style="dim")
        table.add_row(
            part["part"], formatting.count(part["parameters"]), part["dtype"], formatting.size(part["bytes"]), state
        )
    return table


def plan(comparison: Mapping[str, Any]) -> RenderableType:
    """Planned and measured figures (``planning.prediction``), or why nothing was planned."""
    if "beside" not in comparison:
        return Text(f"  not planned: {formatting.plain(comparison['reason'])}", style="dim")
    table = _table(f"Planned and measured (planned peak: {comparison['plan']['peak']['phase']})")
    table.add_column("")
    for heading in ("planned", "measured", "error"):
        table.add_column(heading, justify="right")
    for row in comparison["beside"]:
        cells = (formatting.quantity(row["figure"], row[name]) for name in ("planned", "measured"))
        error = "–" if row["off"] is None else f"{row['off']:+.1%}"
        table.add_row(formatting.name(row["figure"].removesuffix("_bytes")), *cells, error)
    return table


def cleaning(steps: Sequence[Mapping[str, Any]]) -> Table:
    """Cleaning steps: ``name``, ``split``, ``action``, ``rows``, ``examples`` of each."""
    table = _table("Cleaning")
    table.add_column("step")
    table.add_column("split")
    table.add_column("rows", justify="right")
    table.add_column("examples", overflow="fold")
    for step in steps:
        examples = "; ".join(formatting.plain(example, 60) for example in step["examples"][:2])
        action = f"{formatting.count(step['rows'])} {step['action']}" if step["rows"] else "none"
        table.add_row(formatting.name(step["name"]), step["split"], action, Text(examples))
    return table


def splits(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows, tokens and truncation per split, from mappings with the same keys."""
    table = _table("Data")
    for number, heading in enumerate(rows[0] if rows else ()):
        table.add_column(formatting.name(heading), justify="right" if number else "left")
    for row in rows:
        table.add_row(
            *(
                Text(formatting.count(cell) if isinstance(cell, int) else formatting.plain(cell))
                for cell in row.values()
            )
        )
    return table


def answer(value: Any) -> str:
    """A label, a list of labels or a number as one cell."""
    if isinstance(value, float):
        return formatting.figure(value)
    return (
        ", ".join(formatting.plain(item, 24) for item in value) or "none"
        if isinstance(value, list)
        else formatting.plain(value, 24)
    )


def place(row: Mapping[str, Any]) -> str:
    """``file:line`` of a row, as far as known."""
    if not row.get("file"):
        return ""
    file = str(row["file"]).replace("\\", "/").rpartition("/")[2]
    return formatting.plain(f"{file}:{row['line']}" if row.get("line") else file)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="bold", padding=(0, 1))
