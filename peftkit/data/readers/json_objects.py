"""JSON and JSON Lines files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.data import squad_file
from peftkit.data.decoding import Lines, decode_file, detect
from peftkit.data.problems import Problems, shorten
from peftkit.data.reader import Reader
from peftkit.errors import DataError, did_you_mean
from peftkit.schema.recipe import DataConfig
from peftkit.schema.registries import READERS
from peftkit.schema.types import Row

SPACE = re.compile(r"[ \t\r\n]*")
INVALID = (json.JSONDecodeError, RecursionError)
EXPECTED = "expected a list of objects, or an object with a list under 'data'"
_DECODER = json.JSONDecoder()


@READERS.register("jsonl")
@dataclass(frozen=True)
class JsonLinesReader(Reader):
    """JSON Lines files, one object per line; blank lines are skipped.

    A comma after an object is left out, and a file that begins as a JSON list or spreads its objects over several lines
    is read as a JSON file; both are noted.
    """

    extensions = (".jsonl", ".ndjson")
    unpacks = True

    encoding: str | None = None
    """Of files that are not UTF-8; None detects it."""
    key: str | None = None
    """``data.subset``, for a file that turns out to be JSON."""

    @classmethod
    def of(cls, data: DataConfig) -> JsonLinesReader:
        return cls(data.encoding, data.subset)

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        lines = Lines(path, problems, detect(path, self.encoding))
        remarks, first = lines.form.remarks(), True
        for line in lines:
            if not line.strip():
                continue
            if first and _is_json(line):
                problems.note(path, "read as a JSON file, not as JSON Lines")
                yield from JsonReader(self.encoding, self.key).rows(path, problems)
                return
            if first and line.rstrip().endswith("},"):
                remarks = [*remarks, "objects with a comma after each"]
            if first and remarks:
                problems.note(path, f"read as {', '.join(remarks)}")
            first = False
            try:
                value = None if lines.spoiled else _loads_line(line)
                if not lines.spoiled and (row := _object(value, path, lines.number, problems)):
                    yield row
            except INVALID as error:
                problems.add(_json_error(error, path, lines.number, line))
            lines.spoiled = False
        if first:
            raise DataError("the file is empty; expected one JSON object per line", file=path)


@READERS.register("json")
@dataclass(frozen=True)
class JsonReader(Reader):
    """JSON files: a list of objects, JSON Lines, or one object that holds the rows.

    The object may be what pandas writes with any ``orient``, or have the list under ``data``, under its only key with
    a list of objects, or under the one that ``data.subset`` names; or be a file of SQuAD, whose rows are its questions.
    """

    extensions = (".json",)
    unpacks = True

    encoding: str | None = None
    """Of files that are not UTF-8; None detects it."""
    key: str | None = None
    """``data.subset``: the key with the list of rows, where there are several."""

    @classmethod
    def of(cls, data: DataConfig) -> JsonReader:
        return cls(data.encoding, data.subset)

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        """The objects; the file is held in memory as text."""
        text, form = decode_file(path, problems, self.encoding)
        if remarks := form.remarks():
            problems.note(path, f"read as {', '.join(remarks)}")
        document, place = _Document(text, path, problems), _after_space(text, 0)
        if place == len(text):
            raise DataError("the file is empty; expected a list of JSON objects", file=path)
        if text[place] == "[":
            yield from document.elements(place, alone=True)
        elif text[place] == "{":
            yield from document.lines(place) if document.has_several(place) else document.object_rows(place, self.key)
        else:
            raise DataError("expected a list of JSON objects", file=path, line=1)


@dataclass
class _Document:
    """The text of a JSON file."""

    text: str
    path: Path
    problems: Problems

    def elements(self, place: int, *, alone: bool = False) -> Iterator[Row]:
        """Objects of the list that starts at ``place``, each with its line; ``alone``: nothing may follow the list."""
        text, line, counted = self.text, 1, 0
        place = _after_space(text, place + 1)
        while text[place : place + 1] != "]":
            line, counted = line + text.count("\n", counted, place), place
            value, place = self._decode(place, line)
            if row := _object(value, self.path, line, self.problems):
                yield row
            place = _after_space(text, place)
            mark = text[place : place + 1]
            if mark == ",":
                place = _after_space(text, place + 1)
                if text[place : place + 1] == "]":
                    self.problems.note(self.path, "a comma after the last object is left out")
            elif mark != "]":
                message = f"expected ',' or ']' after an object, found {mark or 'the end of the file'}"
                raise self.problems.fatal(DataError(message, file=self.path, line=self._line(place)))
        if alone and (rest := _after_space(text, place + 1)) < len(text):
            message = f"expected the file to end after its list, found {shorten(text[rest : rest + 40])}"
            raise self.problems.fatal(DataError(message, file=self.path, line=self._line(rest)))

    def has_several(self, place: int) -> bool:
        """Whether another object follows the first: JSON Lines, or objects over several lines each."""
        try:
            _, end = _DECODER.raw_decode(self.text, place)
        except INVALID:
            return True  # reading it names what is wrong
        return self.text[_after_space(self.text, end) :][:1] not in ("", "]", "}")

    def lines(self, place: int) -> Iterator[Row]:
        """Objects one after the other, separated by line ends or commas; a bad one is skipped up to its line's end."""
        text, line, counted = self.text, 1, 0
        while place < len(text):
            line, counted = line + text.count("\n", counted, place), place
            try:
                value, place = _DECODER.raw_decode(text, place)
            except INVALID as error:
                end = text.find("\n", place)
                end = len(text) if end < 0 else end
                at = getattr(error, "lineno", line)
                self.problems.add(_json_error(error, self.path, at, text[place:end]))
                if at != line:
                    return  # an object over several lines: what follows is not its own
                place = _after_space(text, end)
                continue
            if row := _object(value, self.path, line, self.problems):
                yield row
            place = _after_space(text, place)
            if text[place : place + 1] == ",":
                self.problems.note(self.path, "commas after the objects are left out")
                place = _after_space(text, place + 1)

    def object_rows(self, place: int, key: str | None) -> Iterator[Row]:
        """The rows that the object at ``place`` holds, whichever way."""
        places, values = self._entries(place)
        tables = [name for name, value in values.items() if _is_table(value)]
        lengths = {len(value) if isinstance(value, list) else -1 for value in values.values()}
        are_columns = len(values) > max(1, len(tables)) and len(lengths) == 1 and -1 not in lengths
        if key is not None and tables:
            if key not in tables:
                hint = did_you_mean(key, tables)
                raise DataError(f"data.subset: there are no rows under '{key}': {hint}", file=self.path)
            yield from self.elements(places[key])
        elif isinstance(values.get("columns"), list) and isinstance(values.get("data"), list):
            self.problems.note(self.path, "read as columns and data (pandas' orient='split')")
            yield from self._split_rows(values["columns"], values["data"], places["data"])
        elif isinstance(values.get("data"), list) and squad_file.is_squad(values["data"]):
            self.problems.note(self.path, "read as SQuAD: articles, paragraphs and questions")
            yield from squad_file.rows(values["data"], text=self.text, path=self.path, problems=self.problems)
        elif isinstance(values.get("data"), list) and not are_columns:
            if others := [name for name in values if name not in ("data", "schema")]:
                self.problems.note(self.path, f"the rows are those under 'data'; left out: {', '.join(others[:8])}")
            yield from self.elements(places["data"])
        elif are_columns:
            self.problems.note(self.path, "read as columns")
            for number, row in enumerate(zip(*values.values()), 1):
                yield self._row(dict(zip(values, row)), number)
        elif len(tables) == 1:
            others = [name for name in values if name != tables[0]]
            left_out = f"; left out: {', '.join(others[:8])}" if others else ""
            self.problems.note(self.path, f"the rows are those under '{tables[0]}'{left_out}")
            yield from self.elements(places[tables[0]])
        elif tables:
            hint = "choose one with data.subset, or write each into a file of a folder (train.json, test.json)"
            raise DataError(f"there are rows under {', '.join(tables[:8])}; {hint}", file=self.path)
        elif len(values) > 1 and all(isinstance(value, dict) and value for value in values.values()):
            yield from self._nested_rows(values, places)
        else:
            raise self._unknown(values)

    def _entries(self, place: int) -> tuple[dict[str, int], dict[str, Any]]:
        """Where the value of each key of an object starts, and the value."""
        text, places, values = self.text, {}, {}
        place = _after_space(text, place + 1)
        while text[place : place + 1] == '"':
            key, place = self._decode(place, self._line(place))
            if text[_after_space(text, place) :][:1] != ":":
                break
            place = _after_space(text, _after_space(text, place) + 1)
            places[str(key)] = place
            values[str(key)], place = self._decode(place, self._line(place))
            place = _after_space(text, place)
            if text[place : place + 1] != ",":
                break
            place = _after_space(text, place + 1)
        if text[place : place + 1] != "}" or _after_space(text, place + 1) != len(text):
            mark = text[place : place + 1] or "the end of the file"
            raise DataError(
                f"not valid JSON: expected ',' or '}}', found {mark}", file=self.path, line=self._line(place)
            )
        return places, values

    def _split_rows(self, columns: list[Any], data: list[Any], place: int) -> Iterator[Row]:
        line = self._line(place)
        for number, row in enumerate(data, 1):
            if not isinstance(row, list) or len(row) != len(columns):
                size = f"a list of {len(row)}" if isinstance(row, list) else shorten(row)
                message = (
                    f"expected {len(columns)} values, as columns are named, found {size} as row {number} of 'data'"
                )
                self.problems.add(DataError(message, file=self.path, line=line))
                continue
            yield self._row(dict(zip(map(str, columns), row)), number)

    def _nested_rows(self, values: dict[str, dict[str, Any]], places: dict[str, int]) -> Iterator[Row]:
        """Rows of an object of objects: the side whose names are numbers holds the rows, or else the longer one."""
        inner = list(dict.fromkeys(key for value in values.values() for key in value))
        by_number = (_all_numbers(values), _all_numbers(inner))
        rows_outside = by_number[0] if by_number[0] != by_number[1] else len(values) > len(inner)
        if by_number[0] == by_number[1] and len(values) == len(inner):
            hint = 'write a list of objects: [{"text": …}, …]'
            raise DataError(f"rows and columns of an object of objects cannot be told apart; {hint}", file=self.path)
        if rows_outside:
            self.problems.note(self.path, "read as an object of rows, whose keys are left out")
            line, counted = 1, 0
            for key, value in values.items():
                line, counted = line + self.text.count("\n", counted, places[key]), places[key]
                yield self._row(value, line)
            return
        self.problems.note(self.path, "read as columns (pandas' orient='columns')")
        for number, name in enumerate(inner, 1):
            yield self._row({column: value[name] for column, value in values.items() if name in value}, number)

    def _row(self, values: dict[str, Any], line: int) -> Row:
        return {**values, "_file": str(self.path), "_line": line}

    def _unknown(self, values: dict[str, Any]) -> DataError:
        names = ", ".join(list(values)[:8]) or "nothing"
        shown = f"an object with {names}{f', … ({len(values)} keys)' if len(values) > 8 else ''}"
        return DataError(f"{EXPECTED}; found {shown}", file=self.path)

    def _decode(self, place: int, line: int) -> tuple[Any, int]:
        try:
            return _DECODER.raw_decode(self.text, place)
        except INVALID as error:
            at = getattr(error, "lineno", line)
            raise self.problems.fatal(_json_error(error, self.path, at, self.text[place : place + 200])) from None

    def _line(self, place: int) -> int:
        return self.text.count("\n", 0, place) + 1


def _is_json(line: str) -> bool:
    """Whether the first line begins a JSON list, or an object that goes on in the next line."""
    start = line.strip()
    return start == "{" or (start.startswith("[") and not start.startswith("[]"))


def _loads_line(line: str) -> Any:
    """The value of a line; a comma after an object, as between the elements of a list, is left out."""
    text = line.strip()
    return json.loads(text[:-1] if text.endswith("},") else text)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _all_numbers(names: Any) -> bool:
    return all(str(name).lstrip("-").isdecimal() for name in names)


def _after_space(text: str, place: int) -> int:
    return SPACE.match(text, place).end()  # type: ignore[union-attr]


def _json_error(error: Exception, path: Path, line: int, start: str) -> DataError:
    message = "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        message = f"not valid JSON: {error.msg} at character {error.colno}"
    if re.match(r"\s*\{\s*'", start):
        message += "; these are Python's quotes: write rows with json.dumps"
    return DataError(message, file=path, line=line)


def _object(value: Any, path: Path, line: int, problems: Problems) -> Row | None:
    if not isinstance(value, dict):
        problems.add(DataError(f"expected a JSON object, found {shorten(value)}", file=path, line=line))
        return None
    return {**value, "_file": str(path), "_line": line}
