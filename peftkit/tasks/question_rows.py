"""A question with the answers in its context, from rows of any form.

{"text": ["in London"], "answer_start": [18]}         as on the hub
[{"text": "in London", "answer_start": 18}]           as in SQuAD's files
"in London", or ["in London"]                         if it occurs once in the context, or with ``answer_start``
[], "", null, or is_impossible: true                  no answer
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from peftkit.data.problems import shorten
from peftkit.errors import DataError
from peftkit.schema.types import Row

START, TEXT, IMPOSSIBLE, ID = "answer_start", "text", "is_impossible", "id"
"""Names that SQuAD gives to the fields of answers and questions."""
COLUMNS = frozenset({START, IMPOSSIBLE, ID})
"""Columns that are read besides those that the recipe names."""
SHOWN = 40
_YES, _NO = ("true", "1", "yes"), ("false", "0", "no", "")


def text_of(row: Row, column: str) -> str:
    """A question or a context; raises DataError where it is empty or no text."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"expected text, found {shorten(value)}", column=column)
    if value is None or not value.strip():
        raise DataError("expected text, found none; fill or remove the row", column=column)
    return value


def answers_of(row: Row, context: str, column: str) -> list[tuple[str, int]]:
    """(text, first character in the context) of each answer of a raw row; empty for a question without one.

    Raises:
        DataError: an answer is not where the row says, or occurs several times and the row does not say where.
    """
    answers = _pairs(_value(row.get(column), column), row.get(START), column)
    impossible = _flag(row.get(IMPOSSIBLE))
    if impossible and answers:
        raise DataError(f"{IMPOSSIBLE} is true, and there is an answer, {shorten(answers[0][0], SHOWN)}", column=column)
    if impossible is False and not answers:
        raise DataError(f"{IMPOSSIBLE} is false, and there is no answer", column=column)
    return [(text, _start(text, start, context, column)) for text, start in answers]


def has_answer(row: Row, column: str) -> bool:
    """Whether a raw row has an answer; one that cannot be read counts as such."""
    try:
        return bool(_pairs(_value(row.get(column), column), row.get(START), column))
    except DataError:
        return True


def _value(value: Any, column: str) -> Any:
    """The cell itself, or what it spells in JSON or Python."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            spelled = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(spelled, (dict, list)):
            return spelled
    return value  # a text that begins with a bracket


def _pairs(value: Any, start: Any, column: str) -> list[tuple[str, Any]]:
    """(text, start or None) of each answer as the row gives them."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [(value, None if start == "" else start)]
    if isinstance(value, Mapping):
        texts, starts = value.get(TEXT), value.get(START)
        if isinstance(texts, str):
            return [(texts, starts)]
        if isinstance(texts, Sequence) and isinstance(starts, Sequence) and len(texts) == len(starts):
            return [(_text(text, column), place) for text, place in zip(texts, starts)]
        if isinstance(texts, Sequence) and starts is None:
            return [(_text(text, column), None) for text in texts]
        if isinstance(texts, Sequence) and isinstance(starts, Sequence):
            raise DataError(f"there are {len(texts)} texts and {len(starts)} values of {START}", column=column)
    elif isinstance(value, Sequence):
        starts = start if isinstance(start, Sequence) and len(start) == len(value) else [None] * len(value)
        return [
            (_text(one.get(TEXT), column), one.get(START)) if isinstance(one, Mapping) else (_text(one, column), place)
            for one, place in zip(value, starts)
        ]
    form = "{'text': ['in London'], 'answer_start': [18]}"
    raise DataError(f"expected an answer's text, or {form}, found {shorten(value)}", column=column)


def _text(text: Any, column: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"expected an answer's text, found {shorten(text)}", column=column)
    return text


def _start(text: str, start: Any, context: str, column: str) -> int:
    """Where an answer begins, checked."""
    places = _places(text, context)
    shown = shorten(text, SHOWN)
    if start is None:
        if len(places) == 1:
            return places[0]
        if not places:
            raise DataError(f"the answer {shown} does not occur in the context, to the letter", column=column)
        raise DataError(
            f"the answer {shown} occurs {len(places)} times in the context, at characters {_listed(places)}; say which "
            f"is meant in a column {START}", column=column,
        )  # fmt: skip
    place = _whole(start)
    if place is None:
        raise DataError(f"expected the number of the answer's first character, found {shorten(start)}", column=START)
    if context[max(place, 0) : max(place, 0) + len(text)] != text or place < 0:
        there = f"outside of its {len(context)} characters"
        if 0 <= place < len(context):
            there = f"where {shorten(context[place : place + len(text)], SHOWN)} stands"
        other = f"it occurs at {_listed(places)}" if places else "it does not occur there to the letter"
        raise DataError(
            f"the answer {shown} is not at character {place} of the context, {there}; {other}", column=column
        )
    return place


def _places(text: str, context: str) -> list[int]:
    """Where a text occurs, overlaps included; at most ten places."""
    places, place = list[int](), context.find(text)
    while place >= 0 and len(places) < 10:
        places.append(place)
        place = context.find(text, place + 1)
    return places


def _listed(places: Sequence[int]) -> str:
    return ", ".join(map(str, places))


def _whole(value: Any) -> int | None:
    """A whole number, as such or as a table's cell spells it."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _flag(value: Any) -> bool | None:
    """Whether a question has no answer, as the row says; None where it does not."""
    if value is None or isinstance(value, bool):
        return value
    word = str(value).strip().casefold()
    if word in _YES:
        return True
    if word in _NO:
        return None if word == "" else False
    raise DataError(f"expected true or false, found {shorten(value)}", column=IMPOSSIBLE)
