"""JSON and JSON Lines files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftkit.data.decoding import Lines, decode_file
from peftkit.data.problems import Problems, shorten
from peftkit.data.reader import Reader
from peftkit.errors import DataError
from peftkit.schema.registries import READERS
from peftkit.schema.types import Row

SPACE = re.compile(r"[ \t\r\n]*")
INVALID = (json.JSONDecodeError, RecursionError)


@READERS.register("jsonl")
class JsonLinesReader(Reader):
    """JSON Lines files, one object per line; blank lines are skipped."""

    extensions = (".jsonl", ".ndjson")

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        empty = True
        with path.open("rb") as stream:
            lines = Lines(stream, path, problems)
            for line in lines:
                if not line.strip():
                    continue
                empty = False
                try:
                    if not lines.spoiled and (row := _object(json.loads(line), path, lines.number, problems)):
                        yield row
                except INVALID as error:
                    problems.add(_json_error(error, path, lines.number))
                lines.spoiled = False
        if empty:
            raise DataError("the file is empty; expected one JSON object per line", file=path)


@READERS.register("json")
class JsonReader(Reader):
    """JSON files: a list of objects, an object whose ``data`` is such a list, or JSON Lines."""

    extensions = (".json",)

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        """The objects; the file is held in memory as text."""
        text = decode_file(path, problems)
        place = _after_space(text, 0)
        if place == len(text):
            raise DataError("the file is empty; expected a list of JSON objects", file=path)
        if text[place] == "{":
            if _is_json_lines(text):
                yield from JsonLinesReader().rows(path, problems)
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
        except INVALID as error:
            raise problems.fatal(_json_error(error, path, getattr(error, "lineno", line))) from None
        if row := _object(value, path, line, problems):
            yield row
        place = _after_space(text, place)
        mark = text[place : place + 1]
        if mark == ",":
            place = _after_space(text, place + 1)
        elif mark != "]":
            message = f"expected ',' or ']' after an object, found {mark or 'the end of the file'}"
            raise problems.fatal(DataError(message, file=path, line=text.count("\n", 0, place) + 1))


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
    except INVALID as error:
        raise _json_error(error, path, getattr(error, "lineno", 1)) from None
    expected = "expected a list of objects, or an object with a list under 'data'"
    raise DataError(f"{expected}; found an object with {', '.join(keys) or 'nothing'}", file=path)


def _is_json_lines(text: str) -> bool:
    first, _, rest = text.strip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip().startswith("{")
    except INVALID:
        return False


def _after_space(text: str, place: int) -> int:
    return SPACE.match(text, place).end()  # type: ignore[union-attr]


def _json_error(error: Exception, path: Path, line: int) -> DataError:
    message = "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        message = f"not valid JSON: {error.msg} at character {error.colno}"
    return DataError(message, file=path, line=line)


def _object(value: Any, path: Path, line: int, problems: Problems) -> Row | None:
    if not isinstance(value, dict):
        problems.add(DataError(f"expected a JSON object, found {shorten(value)}", file=path, line=line))
        return None
    return {**value, "_file": str(path), "_line": line}
