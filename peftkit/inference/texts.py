"""Texts from callers, files and pipes, and rows of results: what predict, embed and generate share."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from peftkit.data.problems import Problems, missing_column, shorten
from peftkit.data.reader import reader_for
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig, Recipe, replace
from peftkit.schema.types import Row
from peftkit.system import files

Text = str | tuple[str, ...]
"""A text, or texts that are read together, such as a pair."""
KEPT_BYTES = 1 << 26
TABLES = {".csv": ",", ".tsv": "\t"}
"""Delimiter of the tables that can be written, by the file's suffix."""


def as_texts(texts: Text | Iterable[Text], lengths: Container[int] = (2,)) -> list[Text]:
    """A list of texts, or of tuples of texts of one of ``lengths``; a single text is a list of one.

    Raises:
        DataError: something else, or both kinds in one call.
    """
    checked: list[Text] = []
    for number, text in enumerate([texts] if isinstance(texts, str) else texts):
        if isinstance(text, (tuple, list)) and len(text) in lengths and all(isinstance(part, str) for part in text):
            text = tuple(text)
        elif not isinstance(text, str):
            raise DataError(
                f"text {number}: expected a text or (text, text pair), found {type(text).__name__} {text!r:.60}"
            )
        if checked and isinstance(text, str) != isinstance(checked[0], str):
            raise DataError(f"text {number}: texts and (text, text pair) tuples are mixed; give one kind per call")
        checked.append(text)
    return checked


def texts_of_columns(
    columns: Mapping[str, str | Sequence[str]], names: Sequence[str], texts: object = None
) -> list[Text]:
    """Texts, or tuples of them, from one text or a list of texts for each column.

    Args:
        names: the columns that are needed, in order.
        texts: what was given besides, which must be nothing.

    Raises:
        DataError: other columns, or columns of different lengths.
    """
    if texts is not None or {*columns} != {*names}:
        also = " besides the texts" if texts is not None else ""
        raise DataError(f"expected {' and '.join(names)}, found {', '.join(columns) or 'nothing'}{also}")
    lists = {name: [value] if isinstance(value, str) else list(value) for name, value in columns.items()}
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{len(values)} of {name}" for name, values in lists.items())
        raise DataError(f"expected as many texts in each column, found {lengths}")
    rows = zip(*(lists[name] for name in names))
    return [row[0] if len(row) == 1 else row for row in rows]


def data_options(recipe: Recipe, delimiter: str | None) -> DataConfig:
    """The recipe's data section, to read another file with; ``delimiter``: a separator, "auto", or None, the recipe's.

    Raises:
        RecipeError: that is no separator.
    """
    if delimiter is None:
        return recipe.data
    return replace(recipe, data={"delimiter": None if delimiter == "auto" else delimiter}).data


def text_of(row: Row, columns: Sequence[str]) -> Text:
    """The text of a row, or the texts of several columns."""
    return row[columns[0]] if len(columns) == 1 else tuple(row[column] for column in columns)


def check_files(file: Path | None, out: Path | None, writers: Sequence[str] | None = None) -> None:
    """Raises DataError if the input cannot be read or the output cannot be written; ``writers`` are its suffixes."""
    if file:
        if not file.is_file():
            raise DataError("no such file", file=file)
        reader_for(file)
    if out and writers and out.suffix not in writers:
        raise DataError(f"cannot be written: its name must end in {', '.join(writers)}", file=out)
    if out:
        files.check_output(out, file)


class InputTexts:
    """Rows of a file, or of the lines of stdin, with a text in each of ``columns``.

    A file is parsed once if it has at most ``KEPT_BYTES``; a larger one is parsed again after ``check``, so that it
    need not fit in memory. ``data`` is what the run's recipe says about files; how an unusual one is read is printed.
    """

    def __init__(self, file: Path | None, columns: Sequence[str], data: DataConfig | None = None) -> None:
        self.file, self.columns, self.data = file, columns, data
        self._checked: deque[Row] | None = None
        self.count: int | None = None
        """Number of rows of a file that was checked."""

    def check(self) -> list[str]:
        """Names of all columns; reads the whole file.

        Raises:
            DataError: everything that is wrong with the file, at once; or pairs from a pipe.
        """
        if self.file is None:
            if len(self.columns) > 1:
                named = " and ".join(self.columns)
                raise DataError(f"pairs of texts ({named}) are read from a file: --file pairs.csv")
            return list(self.columns)
        problems, rows, fits = Problems(), deque[Row](), self.file.stat().st_size <= KEPT_BYTES
        names: dict[str, None] = {}
        self.count = 0
        for row in self._read(problems):
            self.count += 1
            names |= dict.fromkeys(row)
            if fits:
                rows.append(row)
        problems.check()
        print_notes(problems.take_notes())
        self._checked = rows if fits else None
        return list(names)

    def first(self, count: int) -> list[Row]:
        """The first rows of a file that was checked, which are read again afterwards."""
        rows = self._read(Problems()) if self._checked is None else iter(self._checked)
        return list(itertools.islice(rows, count))

    def __iter__(self) -> Iterator[Row]:
        if self._checked is None:
            yield from self._read(Problems())
        while self._checked:
            yield self._checked.popleft()

    def _read(self, problems: Problems) -> Iterator[Row]:
        """The rows; one without a text in one of the columns is a problem."""
        for row in read_rows(self.file, self.columns[0], problems, self.data):
            place = {"file": row.pop("_file"), "line": row.pop("_line")}
            row.pop("_path", None)
            for column in self.columns:
                if column not in row:
                    raise missing_column(column, row, field="--column", file=self.file)
                if not isinstance(row[column], str):
                    problems.add(DataError(f"expected a text, found {shorten(row[column])}", column=column, **place))
            yield row


def print_notes(notes: Iterable[str]) -> None:
    """Prints to stderr how files that are not plain were read."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def read_rows(file: Path | None, column: str, problems: Problems, data: DataConfig | None = None) -> Iterator[Row]:
    """Rows with ``_file`` and ``_line`` of a file, or of stdin; a line of a text is a row with that one column."""
    if file is not None:
        kind = reader_for(file)
        reader = kind() if data is None else kind.of(data.model_copy(update={"subset": None}))
        yield from reader.inputs(file, problems, column)
        return
    for number, line in enumerate(sys.stdin, 1):
        yield {column: line.rstrip("\r\n"), "_file": "stdin", "_line": number}


def write_rows(rows: Iterable[Row], out: Path | None, columns: Sequence[str] = ()) -> int:
    """Writes rows to ``out``, which appears when it is complete, or to stdout; returns how many.

    JSON lines; with ``columns``, the input's, a table where the suffix asks for one.
    """
    if out is None:
        return write_lines(rows, sys.stdout)
    with files.open_atomic(out) as stream:
        if columns and out.suffix in TABLES:
            return _write_table(iter(rows), columns, stream, TABLES[out.suffix])
        return write_lines(rows, stream)


def write_lines(rows: Iterable[Row], stream: IO[str]) -> int:
    """Writes rows as JSON lines; returns how many."""
    count = 0
    for row in rows:
        stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        count += 1
    return count


def _write_table(rows: Iterator[Row], columns: Sequence[str], stream: IO[str], delimiter: str) -> int:
    first = next(rows, {})
    writer = csv.DictWriter(stream, list(dict.fromkeys([*columns, *first])), delimiter=delimiter)
    writer.writeheader()
    count = 0
    for row in itertools.chain([first] if first else [], rows):
        writer.writerow({name: _cell(value) for name, value in row.items()})
        count += 1
    return count


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value
