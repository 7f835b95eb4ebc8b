"""Files → rows. Every reader is a generator of rows that carry ``_file`` and ``_line`` (1-based: the line where the
record starts, or the row of a Parquet file), notes bad rows in a ``Problems`` and goes on, and stops at what it cannot
read past. Readers hold one record at a time, JSON arrays aside, which are held as text.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from peftkit.data.problems import Problems, shorten
from peftkit.errors import DataError
from peftkit.schema.types import Row

Reader = Callable[[Path, Problems], Iterator[Row]]
LARGEST_FIELD = 1 << 24
SECTION = 16_000
_SPACE = " \t\r\n"


def read_csv(path: Path, problems: Problems, delimiter: str = ",", errors: str = "strict") -> Iterator[Row]:
    """Rows of a CSV file with a header line; every value is text.

    Ragged lines, bytes that are not UTF-8, a header with empty or repeated names and quotes that are never closed are
    errors with their line.
    """
    with path.open("rb") as stream:
        lines = _Lines(stream, path, problems, errors)
        # a quote that is never closed swallows the rest of the file: bounded by the largest field
        limit = csv.field_size_limit(LARGEST_FIELD)
        try:
            yield from _csv_rows(csv.reader(lines, delimiter=delimiter, strict=True), lines, path, problems)
        finally:
            csv.field_size_limit(limit)


def read_tsv(path: Path, problems: Problems) -> Iterator[Row]:
    """Rows of a tab-separated file with a header line; quoting as in CSV."""
    return read_csv(path, problems, delimiter="\t")


def _csv_rows(reader: Any, lines: _Lines, path: Path, problems: Problems) -> Iterator[Row]:
    header: list[str] | None = None
    while True:
        start = lines.number + 1
        lines.spoiled = False
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise problems.fatal(_csv_error(error, path, start)) from None
        if fields is None:
            break
        if lines.spoiled or not fields:
            continue  # noted by the decoder; or a blank line
        if header is None:
            header = _header(fields, path, start)
        elif len(fields) != len(header):
            said = (
                f"expected {len(header)} fields as in the header, found {len(fields)}; quote fields with the separator"
            )
            problems.add(DataError(said, file=path, line=start, column=_ragged_column(header, fields)))
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
            said = "the header has this column twice; rename or remove one"
            raise DataError(said, file=path, line=line, column=name)
        if name in ("_file", "_line"):
            raise DataError("this name is reserved; rename the column", file=path, line=line, column=name)
    return names


def _ragged_column(header: list[str], fields: list[str]) -> str:
    """The column at which a ragged line leaves the header: the first missing one, or the last that there is."""
    return header[min(len(fields), len(header) - 1)]


def _csv_error(error: csv.Error, path: Path, line: int) -> DataError:
    said = str(error)
    if "unexpected end of data" in said or "field larger than" in said:
        return DataError("a quote opened in this row is never closed; close or double it", file=path, line=line)
    if "expected after" in said:
        return DataError(
            'a closing quote is followed by text; double a quote inside a quoted field ("")', file=path, line=line
        )
    return DataError(f"not valid CSV: {said}", file=path, line=line)


class _Lines:
    """Lines of a stream as text, counted; a line that is not UTF-8 is noted and spoils its record."""

    def __init__(self, stream: BinaryIO, path: Path, problems: Problems, errors: str = "strict") -> None:
        self.number, self.spoiled, self._errors = 0, False, errors
        self._stream, self._path, self._problems = stream, path, problems

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline()
        if not line:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            line = _without_mark(line, self._path)
        try:
            return line.decode("utf-8", errors=self._errors)
        except UnicodeDecodeError as error:
            self.spoiled = True
            self._problems.add(_not_utf8(line, error, self._path, self.number))
            return line.decode("utf-8", errors="replace")


def _without_mark(start: bytes, path: Path) -> bytes:
    """The first bytes of a file without UTF-8's byte-order mark; raises DataError for UTF-16 and UTF-32."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is UTF-16, expected UTF-8; save it as UTF-8", file=path, line=1)
    return start.removeprefix(b"\xef\xbb\xbf")


def _not_utf8(line: bytes, error: UnicodeDecodeError, path: Path, number: int) -> DataError:
    around = line[max(0, error.start - 12) : error.start + 12].decode("cp1252", errors="replace").strip()
    said = f"byte 0x{line[error.start]:02x} is not UTF-8 (near {shorten(around, 40)}); save the file as UTF-8"
    return DataError(said, file=path, line=number)


def read_jsonl(path: Path, problems: Problems) -> Iterator[Row]:
    """Rows of a file with one JSON object a line; blank lines are passed over."""
    empty = True
    with path.open("rb") as stream:
        lines = _Lines(stream, path, problems)
        for line in lines:
            if lines.spoiled or not line.strip():
                lines.spoiled, empty = False, empty and not lines.spoiled
                continue
            empty = False
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                problems.add(_json_error(error, path, lines.number))
                continue
            if row := _object(value, path, lines.number, problems):
                yield row
    if empty:
        raise DataError("the file is empty; expected one JSON object a line", file=path)


def read_json(path: Path, problems: Problems) -> Iterator[Row]:
    """Rows of a JSON file: a list of objects, or an object whose ``data`` is such a list; JSON lines are taken too."""
    text = _decoded(path, problems)
    place = _after_space(text, 0)
    if place == len(text):
        raise DataError("the file is empty; expected a list of JSON objects", file=path)
    if text[place] == "{":
        if _is_json_lines(text):
            yield from read_jsonl(path, problems)
            return
        place = _find_list(text, place, path)
    if text[place] != "[":
        raise DataError("expected a list of JSON objects", file=path, line=1)
    yield from _elements(text, place, path, problems)


def _elements(text: str, place: int, path: Path, problems: Problems) -> Iterator[Row]:
    """Objects of the list that starts at ``place``, each with the line where it starts."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    place = _after_space(text, place + 1)
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            raise problems.fatal(_json_error(error, path, getattr(error, "lineno", line))) from None
        if row := _object(value, path, line, problems):
            yield row
        place = _after_space(text, place)
        mark = text[place : place + 1]
        if mark == ",":
            place = _after_space(text, place + 1)
        elif mark != "]":
            at = text.count("\n", 0, place) + 1
            said = f"expected ',' or ']' after an object, found {mark or 'the end of the file'}"
            raise problems.fatal(DataError(said, file=path, line=at))


def _find_list(text: str, place: int, path: Path) -> int:
    """Where the list under the key ``data`` starts."""
    decoder, keys = json.JSONDecoder(), []
    place = _after_space(text, place + 1)
    try:
        while text[place : place + 1] == '"':
            key, place = decoder.raw_decode(text, place)
            place = _after_space(text, _after_space(text, place) + 1)
            if key == "data" and text[place : place + 1] == "[":
                return place
            keys.append(str(key))
            _, place = decoder.raw_decode(text, place)
            place = _after_space(text, place)
            place = _after_space(text, place + 1) if text[place : place + 1] == "," else place
    except (json.JSONDecodeError, RecursionError) as error:
        raise _json_error(error, path, getattr(error, "lineno", 1)) from None
    found = ", ".join(keys) or "nothing"
    raise DataError(
        f"expected a list of objects, or an object with a list under 'data'; found an object with {found}", file=path
    )


def _is_json_lines(text: str) -> bool:
    first, _, rest = text.strip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip().startswith("{")
    except (json.JSONDecodeError, RecursionError):
        return False


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place


def _json_error(error: Exception, path: Path, line: int) -> DataError:
    said = (
        f"not valid JSON: {error.msg} at character {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else "nested too deeply"
    )
    return DataError(said, file=path, line=line)


def _object(value: Any, path: Path, line: int, problems: Problems) -> Row | None:
    if not isinstance(value, dict):
        problems.add(DataError(f"expected a JSON object, found {shorten(value)}", file=path, line=line))
        return None
    return {**value, "_file": str(path), "_line": line}


def read_parquet(path: Path, problems: Problems) -> Iterator[Row]:
    """Rows of a Parquet file; ``_line`` is the row's number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    line += 1
                    yield {**row, "_file": str(path), "_line": line}
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise problems.fatal(DataError(f"not a Parquet file that can be read: {first}", file=path)) from None


def class_names(path: Path) -> dict[str, list[str]]:
    """Names of the class-label columns that ``datasets`` wrote into a Parquet file's metadata."""
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features

    try:
        features = Features.from_arrow_schema(pq.read_schema(path))
    except Exception:  # whatever is wrong with the file is said, in full, when its rows are read
        return {}
    return {name: list(held.names) for name, held in features.items() if isinstance(held, ClassLabel) and held.names}


def read_text(path: Path, problems: Problems, *, column: str = "text", fallback: str | None = None) -> Iterator[Row]:
    """A text file as one row under ``column``; ``fallback`` names the encoding of files that are not UTF-8."""
    yield {column: _decoded(path, problems, fallback), "_file": str(path), "_line": 1}


def read_sections(
    path: Path, problems: Problems, *, column: str = "text", document: str | None = None, fallback: str | None = None
) -> Iterator[Row]:
    """A text file as rows of about 16,000 characters, cut at blank lines; joined they are the file.

    ``_document`` is ``document`` for all rows; None makes every section a document of its own.
    """
    text, line, start = _decoded(path, problems, fallback), 1, 0
    while start < len(text):
        end = text.find("\n\n", start + SECTION)
        end = len(text) if end < 0 or len(text) - end < SECTION // 2 else end + 2
        section = text[start:end]
        name = document or f"{path}:{line}"
        yield {column: section, "_document": name, "_file": str(path), "_line": line}
        line += section.count("\n")
        start = end


def _decoded(path: Path, problems: Problems, fallback: str | None = None) -> str:
    held = _without_mark(path.read_bytes(), path)
    try:
        text = held.decode("utf-8")
    except UnicodeDecodeError as error:
        if fallback is None:
            number = held.count(b"\n", 0, error.start) + 1
            raise problems.fatal(_not_utf8(held, error, path, number)) from None
        text = held.decode(fallback, errors="replace")
    return text.replace("\r\n", "\n")


READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}
"""Suffix → reader of files that hold rows; ``.txt`` files hold one text and are read by ``read_text``."""
