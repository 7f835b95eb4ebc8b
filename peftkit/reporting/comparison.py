"""A comparison (compare.json) as table, Markdown, page and plot."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from peftkit.reporting import experiment, formatting, plots
from peftkit.reporting.experiment import LOG_WIDTH, Page

Comparison = Mapping[str, Any]
COSTS = (("trained_parameters", "trained parameters"), ("seconds", "seconds of training"))


def page(table: Comparison) -> Page:
    """The view of a comparison."""
    done = [row for row in table["variants"] if "value" in row]
    if not done:
        rows = [[row["variant"], row["status"]] for row in table["variants"]]
        return Page(f"Comparison {table['name']}", ["", "status"], rows, _remarks(table))
    level, split = f"{table['confidence']:.0%}", table["split"]
    header = ["", f"{formatting.name(table['metric'])} ({split})", f"{level} interval", "± seeds",
              f"vs. {table['against']}", "p", "trained", "saved", "memory", "time"]  # fmt: skip
    rows = [_cells(row) for row in (*table["variants"], *table["baselines"])]
    title = f"Comparison {table['name']}: {table['rows']:,} {split} rows"
    return Page(title, header, rows, [table["pick"], *_remarks(table)], {"compare.png": (plot(table), _caption(table))},
                mark=table["best"])  # fmt: skip


def show(table: Comparison) -> None:
    """Prints the table and the recommendation to stdout."""
    view = page(table)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
    console.print(experiment.terminal(view))
    for sentence in view.sentences:
        console.print(sentence, markup=False, soft_wrap=True)


def fragment(table: Comparison) -> str:
    """The body of the page, for a notebook."""
    return experiment.render(page(table), standalone=False)


def write(table: Comparison, folder: Path) -> None:
    """Writes compare.json, compare.md, compare.html and compare.png."""
    from peftkit.system.files import write_json

    write_json(folder / "compare.json", table)
    experiment.write(page(table), folder, "compare")


def plot(table: Comparison) -> Figure:
    """The metric against its cost, with intervals; baselines as dashed lines."""
    figure, axes = plots.panels(len(COSTS))
    rows = [row for row in table["variants"] if row.get("value") is not None]
    for axis, (key, cost) in zip(axes, COSTS):
        _points(axis, rows, key)
        for number, row in enumerate(row for row in table["baselines"] if row["value"] is not None):
            axis.axhline(row["value"], linestyle="--", linewidth=1.2, color=(plots.FAINT, plots.ORANGE)[number % 2],
                         label=row["variant"])  # fmt: skip
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9, loc="best")
        if all(row[key] > 0 for row in rows):
            axis.set_xscale("log")
        axis.margins(x=0.25, y=0.15)
        plots.dress(axis, f"{formatting.name(table['metric'])} by {cost}", cost)
    return figure


def _points(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    for row in rows:
        known = row["low"] is not None
        below, above = (row["value"] - row["low"], row["high"] - row["value"]) if known else (0.0, 0.0)
        error = np.array([[max(0.0, below)], [max(0.0, above)]])
        axis.errorbar([row[key]], [row["value"]], yerr=error, fmt="o", color=plots.BLUE, capsize=3, markersize=6)
        axis.annotate(formatting.plain(row["variant"], 30), (row[key], row["value"]), textcoords="offset points",
                      xytext=(7, 5), fontsize=8, color=plots.INK, parse_math=False)  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "value" not in row:
        return [row["variant"], row["status"], *[""] * 8]
    known = row.get("low") is not None
    cells = [row["variant"], formatting.figure(row["value"])]
    cells.append(f"{formatting.figure(row['low'])} – {formatting.figure(row['high'])}" if known else "")
    cells.append(formatting.figure(row["deviation"]) if row.get("deviation") is not None else "")
    cells.append("" if row.get("difference") is None else f"{row['difference']:+.4f}")
    cells.append(_chance(row.get("p_value")))
    if "trained_parameters" not in row:
        return [*cells, *[""] * 4]
    cells += [formatting.count(row["trained_parameters"]), formatting.size(row["saved_bytes"])]
    return [*cells, formatting.size(row["peak_memory_bytes"]), f"{row['seconds']:.1f} s"]


def _chance(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _remarks(table: Comparison) -> list[str]:
    """What failed, and how p-values were computed."""
    remarks = []
    for row in table["variants"]:
        if row["status"] != "done":
            reason = f": {'; '.join(row['said'])}" if row["said"] else ""
            remarks.append(f"{row['variant']}: {row['status']}{reason}")
    tests = {row.get("test") for row in table["variants"]} - {None}
    if tests:
        remarks.append(f"p: {' or '.join(sorted(tests))} over the same rows, not corrected for multiple tests.")
    return remarks


def _caption(table: Comparison) -> str:
    return f"{formatting.name(table['metric'])} with {table['confidence']:.0%} intervals against cost"
