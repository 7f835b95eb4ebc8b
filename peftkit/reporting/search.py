"""A search (tune.json) as table, Markdown, page and plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peftkit.reporting import formatting, plots
from peftkit.reporting.experiment import Page

Search = Mapping[str, Any]


def page(table: Search) -> Page:
    """The view of a search."""
    paths = list(dict.fromkeys(path for trial in table["trials"] for path in trial["values"]))
    header = ["trial", f"{formatting.name(table['metric'])} (validation)", *paths, "", "time"]
    best = table["best"]["number"] if table["best"] else None
    rows = [
        [str(trial["number"]), formatting.figure(trial["value"]) if trial["value"] is not None else "",
         *(_value(trial["values"].get(path)) for path in paths), "" if trial["state"] == "complete" else trial["state"],
         f"{trial['seconds']:.1f} s" if trial["seconds"] else ""]
        for trial in table["trials"]
    ]  # fmt: skip
    images = {}
    if any(trial["value"] is not None for trial in table["trials"]):
        images["history.png"] = (history(table), "Validation metric of every trial; the line is the best so far")
    if table["importances"]:
        images["importances.png"] = (importances(table), "Importance of each hyperparameter (optuna)")
    return Page(f"Search {table['name']}: {len(rows)} trials", header, rows, _sentences(table), images,
                mark=None if best is None else str(best))  # fmt: skip


def history(table: Search) -> Figure:
    """The validation metric of every finished trial in order, and the best so far."""
    figure, (axis,) = plots.panels(1)
    done = [trial for trial in table["trials"] if trial["value"] is not None]
    numbers, values = [trial["number"] for trial in done], np.array([trial["value"] for trial in done])
    best = np.maximum.accumulate(values) if table["greater_is_better"] else np.minimum.accumulate(values)
    axis.step(numbers, best, where="post", color=plots.GREEN, linewidth=1.8, label="best so far")
    axis.scatter(numbers, values, s=26, color=plots.BLUE, zorder=3, label="trial")
    cut = [trial for trial in table["trials"] if trial["state"] == "pruned" and trial["validations"]]
    if cut:
        axis.scatter([trial["number"] for trial in cut], [trial["validations"][-1] for trial in cut], s=26,
                     color=plots.FAINT, marker="x", zorder=3, label="pruned")  # fmt: skip
    axis.legend(frameon=False, fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    plots.dress(axis, f"validation {formatting.name(table['metric'])}", "trial")
    return figure


def importances(table: Search) -> Figure:
    """Optuna's hyperparameter importances as bars."""
    figure, (axis,) = plots.panels(1)
    names = sorted(table["importances"], key=table["importances"].get)
    axis.barh([formatting.plain(name, 40) for name in names], [table["importances"][name] for name in names],
              color=plots.BLUE)  # fmt: skip
    plots.dress(axis, f"importance for validation {formatting.name(table['metric'])}", "share")
    return figure


def _sentences(table: Search) -> list[str]:
    best = table["best"]
    if best is None:
        return ["No trial has finished."]
    values = ", ".join(f"{path}={_value(value)}" for path, value in best["values"].items())
    sentences = [f"Best: trial {best['number']}, {formatting.name(table['metric'])} {formatting.figure(best['value'])} "
            f"on validation: {values}"]  # fmt: skip
    if table["rows"]:
        sentences[0] += f" (searched on {table['rows']:,} training rows)"
    if table["test"]:
        value = table["test"].get(table["metric"])
        sentences.append(f"Its test {formatting.name(table['metric'])}, computed once: {formatting.figure(value)}.")
    sentences += [f"Trial {one['number']} failed: {one['said']}" for one in table["trials"] if one["state"] == "fail"]
    return sentences


def _value(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
