"""Numbers, names and users' texts as strings, for terminals and reports."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any


def figure(value: float | None) -> str:
    """Four significant digits, or a dash.

    >>> figure(0.91249), figure(None)
    ('0.9125', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    return f"{value:.4f}" if size < 10 else f"{value:,.2f}" if size < 1000 else f"{value:,.0f}"


def with_interval(entry: Mapping[str, Any]) -> str:
    """``0.9125 [0.8977, 0.9254]``, or the value alone without an interval."""
    if entry.get("low") is None:
        return figure(entry["value"])
    return f"{figure(entry['value'])} [{figure(entry['low'])}, {figure(entry['high'])}]"


def name(metric: str) -> str:
    """``matthews_correlation`` → ``matthews correlation``."""
    return metric.replace("_", " ")


def size(value: float) -> str:
    """Bytes in the largest fitting unit.

    >>> size(90_900_000)
    '90.9 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def quantity(name: str, value: float | None) -> str:
    """A value in the unit that its name implies.

    >>> quantity("peak_memory_bytes", 90_900_000), quantity("seconds", 12.34)
    ('90.9 MB', '12.3 s')
    """
    if value is None:
        return "–"
    return size(value) if name.endswith("_bytes") else f"{value:,.1f} s"


def plain(text: Any, limit: int | None = None) -> str:
    """A user's text on one line, cut to ``limit``, without control and direction characters."""
    spaced = " ".join(str(text).split())
    clean = "".join(letter for letter in spaced if unicodedata.category(letter) not in {"Cc", "Cf", "Cs", "Co", "Cn"})
    return clean if limit is None or len(clean) <= limit else f"{clean[: limit - 1]}…"


def answer(value: Any) -> str:
    """A label, a list of labels or a number as one cell."""
    if isinstance(value, float):
        return figure(value)
    labels = value if isinstance(value, list) else [value]
    return ", ".join(plain(label, 24) for label in labels) or "none"


def place(row: Mapping[str, Any]) -> str:
    """``file:line`` of a row, as far as known."""
    if not row.get("file"):
        return ""
    file = str(row["file"]).replace("\\", "/").rpartition("/")[2]
    return plain(f"{file}:{row['line']}" if row.get("line") else file)
