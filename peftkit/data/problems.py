"""Bad rows are collected and reported together, so that a file can be fixed in one go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peftkit.errors import DataError, did_you_mean

SHOWN = 10


class Problems:
    """Collects what is wrong with rows; ``check`` raises one DataError that shows the first ten."""

    def __init__(self) -> None:
        self.shown: list[DataError] = []
        self.count = 0

    def add(self, error: DataError) -> None:
        """Adds one bad row."""
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(error)

    def fatal(self, error: DataError) -> DataError:
        """Adds a problem past which nothing can be read; returns the error to raise."""
        self.add(error)
        return self.summary()

    def check(self) -> None:
        """Raises what was collected, if anything was."""
        if self.count:
            raise self.summary()

    def summary(self) -> DataError:
        """All problems as one error, with the place of the first."""
        first = self.shown[0]
        if self.count == 1:
            return first
        more = [f"… and {self.count - len(self.shown)} more"] if self.count > len(self.shown) else []
        error = DataError("\n  ".join([f"{self.count} rows are wrong:", *map(str, self.shown), *more]))
        error.file, error.line, error.column = first.file, first.line, first.column
        return error


def located(error: DataError, file: Any, line: Any) -> DataError:
    """The error with file and line, where it has none of its own."""
    if error.file is not None:
        return error
    return DataError(error.message, file=file, line=error.line or line, column=error.column)


def missing_column(column: str, columns: Iterable[str], *, field: str, file: Any = None) -> DataError:
    """The error for a missing column; ``field`` is the recipe's field that names it ("data.text")."""
    names = [name for name in columns if not name.startswith("_")]
    listed = ", ".join(names) or "none"
    message = f"no such column; the columns are: {listed}; {did_you_mean(column, names)}; set {field}"
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        message += " (is the file separated by something other than commas?)"
    return DataError(message, file=file, column=column)


def shorten(value: Any, limit: int = 60) -> str:
    """A value as it is shown in a message."""
    shown = repr(value)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"
