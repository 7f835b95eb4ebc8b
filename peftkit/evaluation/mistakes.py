"""The predictions to read first: wrong, and most sure of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftkit.evaluation.decisions import MULTI, REGRESSION, Decisions
from peftkit.schema.types import TaskInfo

TEXT_CHARACTERS = 500
"""Characters of a text that are kept in a report."""


def worst(
    found: Decisions, gold: np.ndarray, rows: Mapping[str, Sequence[Any]], info: TaskInfo, count: int = 20
) -> list[dict[str, Any]]:
    """At most ``count`` wrong rows, the most confident first; of a regression, the largest errors.

    Args:
        gold: labels in the form of ``found.predicted``.
        rows: columns ``text``, and ``text_pair``, ``_file``, ``_line`` where known.

    Returns:
        For each ``text``, ``gold``, ``predicted``, ``file``, ``line``, and ``confidence`` or ``error``.
    """
    wrong, order = _ranked(found, gold, info)
    made = []
    for row in order[: min(count, int(wrong.sum()))]:
        number = int(row)
        shown = _names(found.predicted[number], info), _names(gold[number], info)
        entry: dict[str, Any] = {"text": _text(rows, number), "gold": shown[1], "predicted": shown[0]}
        if info.problem_type == REGRESSION:
            entry["error"] = float(found.predicted[number] - gold[number])
        else:
            entry["confidence"] = float(_surety(found, gold)[number])
        made.append(entry | _position(rows, number))
    return made


def _ranked(found: Decisions, gold: np.ndarray, info: TaskInfo) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are wrong, and all rows from the worst on."""
    if info.problem_type == REGRESSION:
        error = np.abs(found.predicted - gold)
        return error > 0, np.argsort(-error, kind="stable")
    differs = found.predicted != gold
    wrong = differs.any(axis=1) if info.problem_type == MULTI else differs
    return wrong, np.argsort(-np.where(wrong, _surety(found, gold), -1.0), kind="stable")


def _surety(found: Decisions, gold: np.ndarray) -> np.ndarray:
    """How sure each row was of its decision; of several labels, of the wrong decision it was surest of."""
    if found.predicted.ndim == 1:
        return found.confidence
    assert found.probabilities is not None
    each = np.where(found.predicted == 1, found.probabilities, 1 - found.probabilities)
    return np.where(found.predicted != gold, each, 0.0).max(axis=1)


def _names(value: Any, info: TaskInfo) -> Any:
    if info.problem_type == REGRESSION:
        return float(value)
    if info.problem_type == MULTI:
        return [name for name, held in zip(info.labels, value) if held]
    return info.labels[int(value)]


def _text(rows: Mapping[str, Sequence[Any]], number: int) -> str:
    text = rows["text"][number]
    if "text_pair" in rows:
        text = f"{text} ⏐ {rows['text_pair'][number]}"
    return text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]}…"


def _position(rows: Mapping[str, Sequence[Any]], number: int) -> dict[str, Any]:
    return {
        "file": rows["_file"][number] if "_file" in rows else None,
        "line": int(rows["_line"][number]) if "_line" in rows and rows["_line"][number] is not None else None,
    }
