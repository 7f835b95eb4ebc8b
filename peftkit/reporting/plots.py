"""Plots of a run as matplotlib figures, without pyplot or a display."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peftkit.reporting import formatting

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2563eb", "#d97706", "#059669", "#dc2626"
BLUES = LinearSegmentedColormap.from_list("counts", ["#ffffff", "#c7dbfb", "#5b8def", "#123a8c"])
NUMBERED_CLASSES = 20
"""Largest number of classes whose counts are written into the confusion matrix."""


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes, deterministic."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box
        figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def learning_curves(rows: Sequence[Mapping[str, Any]], metric: str | None = None) -> Figure:
    """Training and validation loss by step, next to a validation metric.

    Args:
        rows: lines of metrics.jsonl; lines with a ``split`` are validations, those with only a ``loss`` training.
        metric: the metric to plot; None or "loss" takes the first validation metric other than the loss.
    """
    training = [row for row in rows if "split" not in row and "loss" in row]
    validations = [row for row in rows if row.get("split") == "validation"]
    if metric in (None, "loss"):
        metric = next((name for row in validations for name in row if name not in _NOT_METRICS), None)
    scored = [row for row in validations if metric in row]
    figure, axes = panels(2 if scored else 1)
    _losses(axes[0], training, validations)
    if scored:
        axis, values = axes[1], _column(scored, str(metric))
        axis.plot(_column(scored, "step"), values, "-o", color=GREEN, markersize=5)
        if not np.isnan(values[-1]):
            axis.annotate(formatting.figure(values[-1]), (scored[-1]["step"], values[-1]), textcoords="offset points",
                          xytext=(0, 8), ha="right", fontsize=9, color=INK)  # fmt: skip
        axis.margins(y=0.15)
        dress(axis, f"validation {formatting.name(str(metric))}", "step")
    return figure


def effects(days: Sequence[str], series: Mapping[str, Sequence[float | None]], limit: float) -> Figure:
    """The size of each measure's difference by day, and the limit from which it counts."""
    figure, (axis,) = panels(1)
    for name, values in series.items():
        axis.plot(days, [np.nan if value is None else value for value in values], "-o", markersize=4, label=name)
    axis.axhline(limit, color=FAINT, linestyle="--", linewidth=1)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.tick_params(axis="x", rotation=30)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    dress(axis, "effect", "day (UTC)")
    return figure


_NOT_METRICS = frozenset({"step", "epoch", "split", "loss", "event", "message"})


def _losses(axis: Axes, training: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]) -> None:
    steps, losses = _column(training, "step"), _column(training, "loss")
    many = len(losses) > 20
    axis.plot(steps, losses, color=BLUE, alpha=0.3 if many else 1.0, linewidth=1.2 if many else 1.8,
              label=None if many else "training")  # fmt: skip
    if many:
        axis.plot(steps, _smooth(losses), color=BLUE, linewidth=2, label="training (smoothed)")
    checked = [row for row in validations if "loss" in row]
    if checked:
        steps, losses = _column(checked, "step"), _column(checked, "loss")
        axis.plot(steps, losses, "-o", color=ORANGE, markersize=5, label="validation")
    if training or checked:
        axis.legend(frameon=False, fontsize=9)
    dress(axis, "loss", "step")


def _smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Centered running mean over a share of the points, narrower at the ends."""
    half = max(1, int(len(values) * share))
    window = np.ones(2 * half + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def confusion_matrix(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> Figure:
    """Gold classes in rows, predicted in columns, shaded by the share of the row, with counts where they fit."""
    matrix = np.asarray(counts, dtype=float)
    rows = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, rows, out=np.zeros_like(matrix), where=rows > 0)
    side = float(np.clip(2.2 + 0.55 * len(labels), 4.2, 13))
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(share, cmap=BLUES, vmin=0, vmax=1)
    _name_classes(axis, labels)
    if len(labels) <= NUMBERED_CLASSES:
        _write_counts(axis, matrix, share)
    bar = figure.colorbar(image, ax=axis, shrink=0.7, aspect=30)
    bar.set_label("share of the gold class", color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK)
    return figure


def _name_classes(axis: Axes, labels: Sequence[str]) -> None:
    """Class names along both axes, slanted if there are few; white lines between the cells."""
    classes, few = len(labels), len(labels) <= 12
    names = [formatting.plain(label, 20) for label in labels]
    # parse_math=False: a class may be called "$5_"
    font: dict[str, Any] = {"fontsize": float(np.clip(11 - classes * 0.14, 4.5, 10)), "parse_math": False}
    slant: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if few else {"rotation": 90}
    axis.set_xticks(range(classes), names, **font, **slant)
    axis.set_yticks(range(classes), names, **font)
    axis.set_xlabel("predicted", color=INK)
    axis.set_ylabel("gold", color=INK)
    axis.spines[:].set_visible(False)
    axis.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5 if few else 0.5)
    axis.tick_params(which="both", length=0, colors=INK)


def _write_counts(axis: Axes, matrix: np.ndarray, share: np.ndarray) -> None:
    longest = max(len(f"{value:.0f}") for value in matrix.flat)
    size = float(np.clip(12 - 0.35 * len(matrix) - max(0, longest - 3), 5, 12))
    for row, column in np.ndindex(*matrix.shape):
        if matrix[row, column]:
            color = "white" if share[row, column] > 0.5 else INK
            axis.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", color=color, fontsize=size)


def reliability_diagram(bins: Sequence[Mapping[str, Any]], error: float | None = None) -> Figure:
    """Accuracy against confidence per bin, with row counts below (Guo et al. 2017, arXiv:1706.04599).

    Args:
        bins: ``low``, ``high``, ``count``, ``confidence``, ``accuracy`` of each.
        error: the expected calibration error, for the title.
    """
    figure = Figure(figsize=(5.2, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    left, right, count, confidence, accuracy = (
        np.array([one[name] for one in bins]) for name in ("low", "high", "count", "confidence", "accuracy")
    )
    width = right - left
    top.plot([0, 1], [0, 1], linestyle="--", color=FAINT, linewidth=1.2, label="perfect", zorder=3)
    top.bar(left, accuracy, width, align="edge", color=BLUE, alpha=0.8, edgecolor="white", label="accuracy")
    top.hlines(confidence, left, right, color=RED, linewidth=2.2, label="mean confidence", zorder=4)
    top.set(xlim=(0, 1), ylim=(0, 1))
    top.legend(frameon=False, fontsize=9, loc="upper left")
    dress(top, "reliability" if error is None else f"reliability: calibration error {error:.3f}", "")
    top.set_ylabel("accuracy", color=INK)
    bottom.bar(left, count, width, align="edge", color=FAINT, edgecolor="white")
    dress(bottom, "", "confidence")
    bottom.set_ylabel("rows", color=INK)
    return figure


def scatter(pairs: Sequence[Sequence[float]], name: str = "value") -> Figure:
    """Predicted against gold numbers of a regression."""
    figure = Figure(figsize=(5.2, 5.0), layout="constrained")
    axis = figure.add_subplot()
    points = np.asarray(pairs, dtype=float).reshape(-1, 2)
    if len(points):
        low, high = float(points.min()), float(points.max())
        axis.plot([low, high], [low, high], linestyle="--", color=FAINT, linewidth=1.2, label="perfect")
        axis.legend(frameon=False, fontsize=9)
    axis.scatter(points[:, 0], points[:, 1], s=14, color=BLUE, alpha=0.45, linewidths=0)
    dress(axis, f"predicted against gold {formatting.plain(name, 30)}", "gold")
    axis.set_ylabel("predicted", color=INK)
    return figure


def choices(records: Sequence[Mapping[str, Any]]) -> Figure:
    """The estimates that a run's automatic fields were chosen by, one panel each, and what was asked for and chosen.

    Args:
        records: ``schema.automatic.Choice`` as JSON.
    """
    figure, axes = panels(len(records))
    for axis, choice in zip(axes, records):
        sizes, estimates = _column(choice["curve"], "size"), _column(choice["curve"], "estimate")
        axis.errorbar(sizes, estimates, yerr=_column(choice["curve"], "error"), fmt="-o", color=BLUE, markersize=4,
                      ecolor=FAINT, elinewidth=1, capsize=2)  # fmt: skip
        axis.axhline(choice["threshold"], color=FAINT, linestyle="--", linewidth=1, label="asked for")
        axis.axvline(choice["size"], color=GREEN, linewidth=1.2, label=f"chosen: {choice['size']}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, fontsize=9, loc="lower right")
        dress(axis, f"estimated share of the gain, method.{choice['field']}=auto", choice["unit"])
    return figure


def panels(number: int) -> tuple[Figure, list[Axes]]:
    """An empty figure of panels side by side."""
    figure = Figure(figsize=(5.6 * number, 3.8), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, number)))


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if row[name] is None else row[name] for row in rows], dtype=float)


def dress(axis: Axes, title: str, across: str) -> None:
    """Applies title, x label and the shared style to a panel."""
    axis.set_title(title, color=INK, fontsize=11, loc="left", parse_math=False)
    axis.set_xlabel(across, color=INK)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.tick_params(colors=INK, labelsize=9, length=3, color=FAINT)
    if across == "step":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
