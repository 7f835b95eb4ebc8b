"""A comparison (compare.json) as table, Markdown, page and plot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from peftkit.reporting import formatting, plots
from peftkit.reporting.experiment import Page

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
    caption = f"{formatting.name(table['metric'])} with {level} intervals against cost"
    return Page(title, header, rows, [table["pick"], *_remarks(table)], {"compare.png": (plot(table), caption)},
                mark=table["best"])  # fmt: skip


def plot(table: Comparison) -> Figure:
    """The metric against its cost, with intervals; baselines as dashed lines."""
    figure, axes = plots.panels(len(COSTS))
    rows = [row for row in table["variants"] if row.get("value") is not None]
    for axis, (key, cost) in zip(axes, COSTS):
        for row in rows:
            low, high = (row["value"] if row[end] is None else row[end] for end in ("low", "high"))
            error = [[max(0.0, row["value"] - low)], [max(0.0, high - row["value"])]]
            axis.errorbar([row[key]], [row["value"]], yerr=error, fmt="o", color=plots.BLUE, capsize=3, markersize=6)
            axis.annotate(formatting.plain(row["variant"], 30), (row[key], row["value"]), textcoords="offset points",
                          xytext=(7, 5), fontsize=8, color=plots.INK, parse_math=False)  # fmt: skip
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


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "value" not in row:
        return [row["variant"], row["status"], *[""] * 8]
    p_value, deviation, difference = (row.get(name) for name in ("p_value", "deviation", "difference"))
    cells = [
        row["variant"],
        formatting.figure(row["value"]),
        "" if row.get("low") is None else f"{formatting.figure(row['low'])} – {formatting.figure(row['high'])}",
        "" if deviation is None else formatting.figure(deviation),
        "" if difference is None else f"{difference:+.4f}",
        "" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}",
    ]
    if "trained_parameters" not in row:  # a baseline
        return [*cells, *[""] * 4]
    sizes = (formatting.size(row[name]) for name in ("saved_bytes", "peak_memory_bytes"))
    return [*cells, f"{row['trained_parameters']:,}", *sizes, f"{row['seconds']:.1f} s"]


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
