"""CSV and TSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peftkit.data.csv_format import LONE_BACKSLASH, CsvFormat, CsvSample
from peftkit.data.decoding import Lines, TextFormat, detect, first_lines
from peftkit.data.header import Header
from peftkit.data.problems import Problems
from peftkit.data.reader import Reader
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig
from peftkit.schema.registries import READERS
from peftkit.schema.types import Row

LARGEST_FIELD = 1 << 24
"""Characters: bounds how much of the file a quote that is never closed swallows."""
SAMPLE = 1 << 18
"""Characters from which separator and quoting are detected."""
SWALLOWED = {"\t": 1}
"""Lines inside a quoted field that look like rows, from which on it is an error; 3 for separators of prose."""


@READERS.register("csv")
@dataclass(frozen=True)
class CsvReader(Reader):
    """CSV and tab-separated files with a header line; every value is text.

    Separator, quoting, encoding and line ends are detected where the recipe does not give them, and noted where they
    are unusual. Ragged lines, bad bytes, a header with repeated names and quotes that are never closed are errors with
    their line.
    """

    extensions = (".csv", ".tsv")
    unpacks = True

    delimiter: str | None = None
    """None detects it."""
    quote: str | None = None
    """``"``, ``'`` or "none"; None detects it."""
    encoding: str | None = None
    """Of files that are not UTF-8; None detects it."""
    errors: str = "strict"
    """What is done about bytes that are not UTF-8, as for ``bytes.decode``; but for strict, UTF-8 is not questioned."""

    @classmethod
    def of(cls, data: DataConfig) -> CsvReader:
        return cls(data.delimiter, data.quote, data.encoding)

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        text = detect(path, self.encoding) if self.errors == "strict" else TextFormat("utf-8")
        expected = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes[-2:]) else ","
        limit = csv.field_size_limit(LARGEST_FIELD)
        try:
            sample = CsvSample(path, *first_lines(path, text, SAMPLE))
            form = sample.format(self.delimiter, self.quote, expected)
            if remarks := form.remarks(expected) + text.remarks():
                problems.note(path, f"read as {', '.join(remarks)}")
            lines = Lines(path, problems, text, self.errors)
            yield from _Table(path, form, lines, problems, strict=self.quote is None).rows()
        finally:
            csv.field_size_limit(limit)


@dataclass
class _Table:
    """The rows of a file whose format is known; ``strict`` doubts quoted fields that look like several rows."""

    path: Path
    form: CsvFormat
    lines: Lines
    problems: Problems
    strict: bool

    def rows(self) -> Iterator[Row]:
        header: Header | None = None
        for fields, line in self._records():
            if header is None:
                header = Header.of(fields, self.path, line)
                header.note_unnamed(self.problems)
                continue
            if self.form.trailing and len(fields) == len(header.names) + 1 and not fields[-1].strip():
                fields.pop()
            if len(fields) != len(header.names):
                self.problems.add(self._ragged(fields, header, line))
            elif self.strict and (swallowed := self._swallowed(fields)):
                message = f"a quoted field holds {swallowed} lines that look like rows of their own"
                hint = "close the quote, or set data.quote (none: quotes are plain characters)"
                self.problems.add(DataError(f"{message}; {hint}", file=self.path, line=line))
            else:
                yield header.row(fields, line)
        if header is None:
            self.problems.check()
            raise DataError("the file is empty; expected a header line and rows", file=self.path)

    def _records(self) -> Iterator[tuple[list[str], int]]:
        """Fields and first line of each row; rows with bad bytes, which are among the problems, are left out."""
        reader = self.form.reader(self._checked_lines())
        while True:
            start, self.lines.spoiled = self.lines.number + 1, False
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise self.problems.fatal(self._error(error, start)) from None
            if fields is None:
                return
            if fields and not self.lines.spoiled:
                yield fields, start

    def _checked_lines(self) -> Iterator[str]:
        for line in self.lines:
            if self.form.sep_line and self.lines.number == 1:
                continue
            if self.form.backslash and LONE_BACKSLASH.search(line):
                message = 'a backslash stands before something other than a quote, but \\" is a quote in this file'
                error = DataError(f'{message}; write "" for a quote', file=self.path, line=self.lines.number)
                raise self.problems.fatal(error)
            yield line

    def _ragged(self, fields: list[str], header: Header, line: int) -> DataError:
        names = header.names
        column = names[min(len(fields), len(names) - 1)]  # the first one missing, or the last
        message = f"expected {len(names)} fields as in the header, found {len(fields)}"
        hint = f"quote fields that contain the separator ({self.form.name}), or set data.delimiter"
        return DataError(f"{message}; {hint}", file=self.path, line=line, column=column)

    def _swallowed(self, fields: list[str]) -> int:
        """How many lines inside a quoted field have the separators of a row: a quote that closes in another row."""
        for place, field in enumerate(fields):
            if "\n" in field:
                counts = [line.count(self.form.delimiter) for line in field.split("\n")]
                expected = [len(fields) - 1 - place, *([len(fields) - 1] * (len(counts) - 2)), place]
                if counts == expected and len(fields) > 1 and len(counts) - 2 >= SWALLOWED.get(self.form.delimiter, 3):
                    return len(counts)
        return 0

    def _error(self, error: csv.Error, line: int) -> DataError:
        message = f"not valid CSV: {error}"
        if "unexpected end of data" in message or "field larger than" in message:
            message = "a quote opened in this row is never closed; close or double it, or set data.quote=none"
        elif "expected after" in message:
            message = (
                'a closing quote is followed by text; double a quote inside a quoted field (""), or set data.quote'
            )
        elif "new-line character" in message:
            message = "a carriage return stands inside a field; quote the field, or end all lines alike"
        return DataError(message, file=self.path, line=line)
