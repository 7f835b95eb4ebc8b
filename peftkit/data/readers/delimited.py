"""CSV and TSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.data.decoding import Lines
from peftkit.data.problems import Problems
from peftkit.data.reader import Reader
from peftkit.errors import DataError
from peftkit.schema.registries import READERS
from peftkit.schema.types import Row

LARGEST_FIELD = 1 << 24
"""Characters: bounds how much of the file a quote that is never closed swallows."""


@READERS.register("csv")
@dataclass(frozen=True)
class CsvReader(Reader):
    """CSV and tab-separated files with a header line; every value is text.

    Ragged lines, bytes that are not UTF-8, a header with empty or repeated names and quotes that are never closed are
    errors with their line.
    """

    extensions = (".csv", ".tsv")

    errors: str = "strict"
    """What is done about bytes that are not UTF-8, as for ``bytes.decode``."""

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        with path.open("rb") as stream:
            lines = Lines(stream, path, problems, self.errors)
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            limit = csv.field_size_limit(LARGEST_FIELD)
            try:
                yield from _rows(csv.reader(lines, delimiter=delimiter, strict=True), lines, path, problems)
            finally:
                csv.field_size_limit(limit)


def _rows(reader: Any, lines: Lines, path: Path, problems: Problems) -> Iterator[Row]:
    header: list[str] | None = None
    while True:
        start, lines.spoiled = lines.number + 1, False
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise problems.fatal(_error(error, path, start)) from None
        if fields is None:
            break
        if lines.spoiled or not fields:
            continue  # already among the problems; or a blank line
        if header is None:
            header = _header(fields, path, start)
        elif len(fields) != len(header):
            column = header[min(len(fields), len(header) - 1)]  # the first one missing, or the last
            count = f"expected {len(header)} fields as in the header, found {len(fields)}"
            message = f"{count}; quote fields that contain the separator"
            problems.add(DataError(message, file=path, line=start, column=column))
        else:
            yield {**dict(zip(header, fields)), "_file": str(path), "_line": start}
    if header is None:
        problems.check()
        raise DataError("the file is empty; expected a header line and rows", file=path)


def _header(fields: list[str], path: Path, line: int) -> list[str]:
    names = [name.strip() for name in fields]
    for place, name in enumerate(names, 1):
        if not name:
            raise DataError(f"the header's field {place} is empty; give every column a name", file=path, line=line)
        if names.index(name) != place - 1:
            raise DataError("the header has this column twice; rename or remove one", file=path, line=line, column=name)
        if name in ("_file", "_line"):
            raise DataError("this name is reserved; rename the column", file=path, line=line, column=name)
    return names


def _error(error: csv.Error, path: Path, line: int) -> DataError:
    message = f"not valid CSV: {error}"
    if "unexpected end of data" in message or "field larger than" in message:
        message = "a quote opened in this row is never closed; close or double it"
    elif "expected after" in message:
        message = 'a closing quote is followed by text; double a quote inside a quoted field ("")'
    return DataError(message, file=path, line=line)
