"""The header of a table: names of its columns, and rows of values under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.data.problems import Problems, shorten
from peftkit.errors import DataError
from peftkit.schema.types import Row

RESERVED = ("_file", "_line")


@dataclass(frozen=True)
class Header:
    """Names of the columns, without the spaces around them.

    A first column without a name is the index that pandas writes, and is left out. Another one without a name is left
    out if it is blank in every row, and an error otherwise. Raises DataError for names that are repeated or reserved.
    """

    names: tuple[str, ...]
    path: Path
    line: int

    def __post_init__(self) -> None:
        for place, name in enumerate(self.names):
            if name and self.names.index(name) != place:
                raise self._error("the header has this column twice; rename or remove one", name)
            if name in RESERVED:
                raise self._error("this name is reserved; rename the column", name)
        if not any(self.names):
            raise self._error("the header is empty; expected the names of the columns in the first row")

    @classmethod
    def of(cls, cells: Sequence[Any], path: Path, line: int) -> Header:
        return cls(tuple("" if cell is None else str(cell).strip() for cell in cells), path, line)

    def note_unnamed(self, problems: Problems) -> None:
        """Reports the columns without a name, which are left out."""
        if not self.names[0]:
            problems.note(self.path, "the first column has no name, as an index written by pandas; it is left out")
        if "" in self.names[1:]:
            problems.note(self.path, "blank columns without a name are left out")

    def row(self, values: Sequence[Any], line: int) -> Row:
        """The values under their names, with ``_file`` and ``_line``; raises DataError for one that has no name."""
        row = dict(zip(self.names, values))
        if "" in row:
            self._check_unnamed(values, line)
            del row[""]
        return {**row, "_file": str(self.path), "_line": line}

    def _check_unnamed(self, values: Sequence[Any], line: int) -> None:
        for place, (name, value) in enumerate(zip(self.names, values)):
            if place and not name and value is not None and str(value).strip():
                message = f"the header's field {place + 1} is empty; give every column a name"
                raise self._error(f"{message} (line {line} holds {shorten(value)} there)")

    def _error(self, message: str, column: str | None = None) -> DataError:
        return DataError(message, file=self.path, line=self.line, column=column)
