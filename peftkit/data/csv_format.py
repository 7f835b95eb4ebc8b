"""How a CSV file is written: its separator and its quoting, detected from the first rows or given by the recipe."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
SEP_LINE = re.compile(r"\ufeff?\"?sep=(.)\"?\r?\n?", re.IGNORECASE)
"""The first line by which Excel is told the separator."""
LONE_BACKSLASH = re.compile(r'\\(?!")')
NAMES = {",": "comma", "\t": "tab", " ": "space"}


@dataclass(frozen=True)
class CsvFormat:
    """How the rows of a CSV file are written.

    Args:
        delimiter: separates the fields.
        quote: may enclose a field; None: quotes are plain characters.
        backslash: a quote inside a quoted field is written ``\\"`` rather than doubled.
        spaces: every separator is followed by a space, which is not part of the field.
        trailing: every row, but not the header, ends with a separator.
        sep_line: the first line is ``sep=;`` and no row.
    """

    delimiter: str = ","
    quote: str | None = '"'
    backslash: bool = False
    spaces: bool = False
    trailing: bool = False
    sep_line: bool = False

    def reader(self, lines: Iterable[str]) -> Any:
        """The fields of each row; raises ``csv.Error`` for a row that is not written so."""
        options: dict[str, Any] = {"delimiter": self.delimiter, "skipinitialspace": self.spaces, "strict": True}
        if self.quote is None:
            return csv.reader(lines, quoting=csv.QUOTE_NONE, **options)
        if self.backslash:
            return csv.reader(lines, quotechar=self.quote, escapechar="\\", doublequote=False, **options)
        return csv.reader(lines, quotechar=self.quote, **options)

    def remarks(self, expected: str) -> list[str]:
        """What is not as in a plain file, whose separator is ``expected``, in words."""
        remarks = [f"{self.name}-separated"] if self.delimiter != expected else []
        remarks += ["quoted with '"] if self.quote == "'" else ["without quoting"] if self.quote is None else []
        remarks += ['\\" for a quote'] if self.backslash else []
        remarks += ["rows with a space after each separator"] if self.spaces else []
        remarks += ["rows with a separator at the end"] if self.trailing else []
        return remarks

    @property
    def name(self) -> str:
        """The separator in words."""
        return NAMES.get(self.delimiter, self.delimiter)


@dataclass(frozen=True)
class CsvSample:
    """The first lines of a file; ``complete`` if there are no others."""

    path: Path
    lines: list[str]
    complete: bool

    def format(self, delimiter: str | None, quote: str | None, expected: str) -> CsvFormat:
        """The only format under which every row has as many fields as the header, which has two or more.

        Where there is none, the one under which most rows do: reading the file names those that do not.

        Args:
            delimiter, quote: what the recipe gives (``data.delimiter``, ``data.quote``); None detects it.
            expected: the separator by the file's name.

        Raises:
            DataError: several separators fit; says how to choose one.
        """
        line = SEP_LINE.fullmatch(self.lines[0]) if self.lines else None
        if line:
            rest = replace(self, lines=self.lines[1:])
            return replace(rest.format(delimiter or line[1], quote, expected), sep_line=True)
        delimiters = (delimiter,) if delimiter else DELIMITERS
        likeliest, most = CsvFormat(delimiter or expected, None if quote == "none" else quote or '"'), -1.0
        for quoting in _quotings(quote):
            fitting = []
            for form in (replace(quoting, delimiter=mark) for mark in delimiters):
                records = self.records(form) if self._shows(form, quote) else None
                if records and len(records[0]) > 1:
                    share = _share_of_fitting(records)
                    fitting += [_with_details(form, records)] if share == 1 else []
                    likeliest, most = (form, share) if share > most else (likeliest, most)
            if fitting:
                return self._without_single_quotes(self._only(fitting, expected), quote)
        return likeliest

    def records(self, form: CsvFormat) -> list[list[str]] | None:
        """The fields of the rows; None where they are not written so."""
        records = []
        try:
            for row in form.reader(self.lines):
                records += [row] if row else []
        except csv.Error as error:
            if self.complete or "unexpected end of data" not in str(error):
                return None  # else the last row goes on after the sample
        return records

    def _shows(self, form: CsvFormat, quote: str | None) -> bool:
        """Whether quoting that is unusual and not given is there to be seen, and nothing of the usual one."""
        if form.backslash:
            return any('\\"' in line for line in self.lines) and not any(map(LONE_BACKSLASH.search, self.lines))
        if form.quote != "'" or quote is not None:
            return True
        starts = re.compile(f"(?:^|{re.escape(form.delimiter)})(['\"])")
        return {match[1] for line in self.lines for match in starts.finditer(line)} == {"'"}

    def _only(self, fitting: list[CsvFormat], expected: str) -> CsvFormat:
        if len(fitting) == 1:
            return fitting[0]
        by_name = [form for form in fitting if form.delimiter == expected]
        if by_name and (expected == "\t" or len(self.lines) < 2):
            return by_name[0]
        names = " and ".join(form.name for form in fitting)
        raise DataError(f"{names} separate every row equally well; set data.delimiter", file=self.path, line=1)

    def _without_single_quotes(self, form: CsvFormat, quote: str | None) -> CsvFormat:
        """The format with ' as the quote, if that encloses all fields of a column, or one with a doubled ' inside.

        Raises DataError if it does but the rows do not read so.
        """
        records, single = self.records(form) or [], replace(form, quote="'")
        if quote is not None or form.quote != '"' or not records or not self._shows(single, quote):
            return form
        if all(map(_single_quoted, records[0])):
            return single
        columns = list(zip(*records[1:]))
        whole = len(records) > 2 and any(all(map(_single_quoted, column)) for column in columns)
        doubled = any(_single_quoted(value) and "''" in value[1:-1] for column in columns for value in column)
        inner = self.records(single) if whole or doubled else None
        if inner is not None and _share_of_fitting(inner) == 1:
            return single
        if doubled:
            raise DataError("some fields are quoted with ', but not every row reads so; set data.quote", file=self.path)
        return form


def _single_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] == "'"


def _quotings(quote: str | None) -> list[CsvFormat]:
    """Ways of quoting, in the order in which they are tried; each with any separator."""
    if quote == "none":
        return [CsvFormat(quote=None)]
    ways = [CsvFormat(quote=mark) for mark in ((quote,) if quote else ('"', "'"))]
    first = ways[0]
    return [first, replace(first, spaces=True), replace(first, backslash=True), *ways[1:]]


def _with_details(form: CsvFormat, records: list[list[str]]) -> CsvFormat:
    header, *rows = records
    trailing = any(len(row) > len(header) for row in rows)
    spaced = all(field.startswith(" ") for row in records for field in row[1:])
    return replace(form, trailing=trailing, spaces=form.spaces or spaced)


def _share_of_fitting(records: list[list[str]]) -> float:
    """Share of the rows with as many fields as the header; 1 also where each has one more, which is blank."""
    header, *rows = records
    if not rows or (len(rows) > 2 and all(len(row) == len(header) + 1 and not row[-1].strip() for row in rows)):
        return 1.0
    return sum(len(row) == len(header) for row in rows) / len(rows)
