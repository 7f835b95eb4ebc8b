"""Excel files, read by openpyxl (``pip install 'peftkit[excel]'``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from peftkit.data.header import Header
from peftkit.data.problems import Problems
from peftkit.data.reader import Reader
from peftkit.errors import DataError, did_you_mean
from peftkit.schema.recipe import DataConfig
from peftkit.schema.registries import READERS
from peftkit.schema.types import Row

INSTALL = "Excel files are read by openpyxl; run `pip install openpyxl`, or save the sheet as CSV"


@READERS.register("excel")
@dataclass(frozen=True)
class ExcelReader(Reader):
    """Excel files (.xlsx) with a header row; ``_line`` is the row's number.

    Cells hold what Excel stores, not what it shows: 1.10 is the number 1.1. Where a column has texts, its other values
    become text; dates become ISO 8601. Blank rows are left out.
    """

    extensions = (".xlsx", ".xlsm")

    sheet: str | None = None
    """``data.subset``: the sheet, where several have rows."""

    @classmethod
    def of(cls, data: DataConfig) -> ExcelReader:
        return cls(data.subset)

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        """The rows of the sheet, which is held in memory."""
        title, table = self._choose(_read_sheets(path), path)
        errors = [(line, value) for line, cells in table for value in cells if _is_error(value)]
        for line, value in errors:
            problems.add(DataError(f"a cell holds Excel's error {value}; correct it", file=path, line=line))
        (line, names), *rest = table
        header = Header.of(names, path, line)
        header.note_unnamed(problems)
        if title != "Sheet1":
            problems.note(path, f"read from the sheet '{title}'")
        columns = [_values(column) for column in zip(*(cells for _, cells in rest))]
        for name, column in zip(header.names, zip(*(cells for _, cells in rest))):
            if name and (numbers := _numbers_among_texts(column)):
                texts = "1 number or date" if numbers == 1 else f"{numbers} numbers or dates"
                be = "is" if numbers == 1 else "are"
                problems.note(path, f"{texts} in the column '{name}' {be} read as text")
        for (line, _), values in zip(rest, zip(*columns)):
            yield header.row(values, line)

    def _choose(self, sheets: dict[str, _Table], path: Path) -> tuple[str, _Table]:
        filled = {title: table for title, table in sheets.items() if table}
        if self.sheet is not None:
            if self.sheet not in filled:
                hint = did_you_mean(self.sheet, filled)
                raise DataError(f"data.subset: there is no sheet '{self.sheet}' with rows: {hint}", file=path)
            return self.sheet, filled[self.sheet]
        if not filled:
            raise DataError("the file is empty; expected a header row and rows", file=path)
        if len(filled) > 1:
            names = ", ".join(list(filled)[:8])
            raise DataError(f"several sheets have rows ({names}); choose one with data.subset", file=path)
        return next(iter(filled.items()))


_Table = list[tuple[int, Sequence[Any]]]
"""Numbers and cells of the rows that are not blank."""


def _read_sheets(path: Path) -> dict[str, _Table]:
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise DataError(INSTALL, file=path) from None
    try:
        book = load_workbook(path, read_only=True, data_only=True)
        sheets = {sheet.title: _filled_rows(sheet.iter_rows(values_only=True)) for sheet in book.worksheets}
        book.close()
    except (BadZipFile, KeyError, ValueError, OSError, TypeError, AttributeError, SyntaxError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"not an Excel file that can be read: {reason}", file=path) from None
    return sheets


def _filled_rows(rows: Iterator[tuple[Any, ...]]) -> _Table:
    """The rows that are not blank, all as wide as the widest one."""
    filled = [(line, cells) for line, cells in enumerate(rows, 1) if any(not _is_blank(cell) for cell in cells)]
    width = max(
        (place + 1 for _, cells in filled for place, cell in enumerate(cells) if not _is_blank(cell)), default=0
    )
    return [(line, [*cells[:width], *[None] * (width - len(cells))]) for line, cells in filled]


def _values(column: Sequence[Any]) -> list[Any]:
    """The values of a column; all are text where one is."""
    values = [_plain(value) for value in column]
    if any(isinstance(value, str) for value in values):
        return [value if value is None else str(value) for value in values]
    return values


def _plain(value: Any) -> Any:
    """A cell's value; dates and times as ISO 8601."""
    if isinstance(value, datetime) and value.time() == time():
        return value.date().isoformat()
    if isinstance(value, (date, time)):
        return value.isoformat()
    return str(value) if isinstance(value, timedelta) else value


def _numbers_among_texts(column: Sequence[Any]) -> int:
    others = sum(value is not None and not isinstance(value, str) for value in column)
    return others if others < sum(value is not None for value in column) else 0


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _is_error(value: Any) -> bool:
    return isinstance(value, str) and value in ("#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!")
