"""Bad rows are collected and reported together, so that a file can be fixed in one go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit.errors import DataError, did_you_mean

SHOWN = 10
NAMES, NAME = 12, 40
"""Columns that a message lists, and characters of each."""
FEW, LOOKED_AT, WORDS = 4, 100, 6
"""Columns that are shown of a file without a header; rows, and words in a column's name, by which it is known."""


class Problems:
    """Collects what is wrong with rows; ``check`` raises one DataError that shows the first ten."""

    def __init__(self) -> None:
        self.shown: list[DataError] = []
        self.count = 0
        self._notes: dict[str, None] = {}

    def note(self, file: Path, message: str) -> None:
        """Adds what the user should know about how a file is read ("read as ;-separated, cp1252"), once."""
        self._notes[f"{file}: {message}"] = None

    def take_notes(self) -> list[str]:
        """The notes since the last call, each with its file."""
        notes, self._notes = list(self._notes), {}
        return notes

    def add(self, error: DataError) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(error)

    def fatal(self, error: DataError) -> DataError:
        """Adds a problem past which nothing can be read; returns the error to raise."""
        self.add(error)
        return self.summary()

    def check(self) -> None:
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


def located(error: DataError, file: Any, line: Any, *, path: str | None = None) -> DataError:
    """The error with file and line, where it has none of its own; ``path``: of the record among nested ones."""
    if error.file is not None:
        return error
    column = error.column if path is None else ".".join(filter(None, (path, error.column)))
    return DataError(error.message, file=file, line=error.line or line, column=column)


def missing_column(column: str, columns: Iterable[str], *, field: str, file: Any = None) -> DataError:
    """The error for a missing column; ``field`` is the recipe's field that names it ("data.text")."""
    names = [name if len(name) <= NAME else f"{name[:NAME]}…" for name in columns if not name.startswith("_")]
    near = did_you_mean(column, names)
    more = f", … ({len(names)} columns)" if len(names) > NAMES else ""
    listed = f" The columns are: {', '.join(names[:NAMES])}{more};" if near.endswith("?") or more else ";"
    message = f"no such column: {near}{listed} set {field}"
    if len(names) == 1:
        delimiter = "--delimiter" if field.startswith("--") else "data.delimiter"
        message += f", or {delimiter} if the columns are separated by another character"
    return DataError(message, file=file, column=column)


def require_column(dataset: Any, name: str, field: str) -> None:
    """Raises DataError when a ``datasets.Dataset`` has no column ``name``, which the recipe's ``field`` names."""
    if name in dataset.column_names:
        return
    file = dataset[0].get("_file") if len(dataset) else None
    error = missing_column(name, dataset.column_names, field=field, file=file)
    columns = {column: values for column, values in dataset[:LOOKED_AT].items() if not column.startswith("_")}
    if _first_row_is_header(columns):
        first = ", ".join(shorten(column, NAME) for column in list(columns)[:FEW])
        first += f", … ({len(columns)} columns)" if len(columns) > FEW else ""
        hint = "begin the file with a line of column names, such as text,label"
        message = f"no such column: the first line is read as names, but looks like a row: {first}; {hint}"
        raise DataError(message, file=file, column=name)
    for column, values in columns.items():
        if values and isinstance(inner := values[0], dict):
            hint = f"what is inside '{column}' ({', '.join(list(inner)[:8])}) is not looked at: write it into columns"
            raise DataError(f"{error.message}; {hint}", file=file, column=name)
    raise error


def _first_row_is_header(columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether names of columns look like values: a sentence, or what the column also holds in several rows."""
    texts = {name: [value for value in values if isinstance(value, str)] for name, values in columns.items()}
    return any(len(name.split()) >= WORDS for name in columns) or any(
        values.count(name) >= 2 for name, values in texts.items()
    )


def shorten(value: Any, limit: int = 60) -> str:
    """A value as it is shown in a message."""
    shown = repr(value)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"
