"""Views of ``peftkit monitor``: what differs from the validation rows, as a table, a page and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from peftkit.reporting import experiment, plots
from peftkit.reporting.experiment import Page

HEADER = ("measure", "day", "texts", "validated", "served", "effect", "p", "")
NAME = "monitor"


def show(table: Mapping[str, Any]) -> None:
    """Prints the whole, and of the days those that differ."""
    experiment.show(page(table, every_day=False))


def write(folder: Path, table: Mapping[str, Any]) -> None:
    """Writes monitor.json, monitor.md, monitor.html and, of several days, monitor.png."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment.write(folder, NAME, table, page(table))


def page(table: Mapping[str, Any], *, every_day: bool = True) -> Page:
    """The page of a comparison as ``monitoring.monitor`` gives it."""
    images: dict[str, tuple[Figure, str]] = {}
    days = [day for day in table["days"] if any(one["effect"] is not None for one in day["measures"])]
    if every_day and len(days) > 2:
        caption = "Difference from the validation rows by day; the dashed line is where an alarm begins"
        images[f"{NAME}.png"] = (_plot(days[1:], table["effect"]), caption)
    rows = [row for number, day in enumerate(table["days"]) for row in _rows(day, full=every_day or not number)]
    return Page(f"{table['model']}: served and validated texts", HEADER, rows, list(_sentences(table)), images)


def _rows(day: Mapping[str, Any], *, full: bool) -> Iterator[list[str]]:
    for one in day["measures"]:
        if full or one["drift"]:
            numbers = ["–" if one[name] is None else f"{one[name]:.4g}" for name in ("reference", "served", "effect")]
            p_value = _p_value(one["p_value"])
            note = " ".join(filter(None, ["DRIFT" if one["drift"] else "", one["note"]]))
            yield [one["measure"], day["day"], f"{one['rows']:,}", *numbers, p_value, note]


def _p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _sentences(table: Mapping[str, Any]) -> Iterator[str]:
    drifted = {one["measure"]: None for day in table["days"] for one in day["measures"] if one["drift"]}
    tested = any(one["p_value"] is not None for day in table["days"] for one in day["measures"])
    if drifted:
        yield f"Served texts differ from the {table['validated']:,} validated ones in {', '.join(drifted)}."
    elif tested:
        yield f"No difference from the {table['validated']:,} validated texts was found."
    else:
        yield "Nothing was tested: there are too few texts. --reference FILE names others to compare with."
    yield (
        f"An alarm needs p < {table['level']:g}, corrected for all tests together (Holm), and an effect of "
        f"{table['effect']:g} or more."
    )
    median, late = table["days"][0]["seconds"]
    yield f"Answered in {median:.3f} s (median) and {late:.3f} s (95th percentile)."
    if table["damaged"]:
        yield f"{table['damaged']:,} damaged lines of the log were skipped."


def _plot(days: list[Mapping[str, Any]], limit: float) -> Figure:
    names = list(dict.fromkeys(one["measure"] for day in days for one in day["measures"]))
    series = {
        name: [next((one["effect"] for one in day["measures"] if one["measure"] == name), None) for day in days]
        for name in names
    }
    return plots.effects([day["day"] for day in days], series, limit)
