"""Words with tags, from rows of either form: lists of words and tags, or a text with the entities in it."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.data.problems import shorten
from peftkit.errors import DataError
from peftkit.evaluation.entities import OUTSIDE, has_prefix

UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Kana and Chinese characters, which are written without spaces between words."""
JOINERS = "\u200c\u200d"
SPAN_KEYS = ("start", "end", "label")


@dataclass(frozen=True)
class TaggedWords:
    """A text, its words by character offsets, and their tags; no tags where they are not known."""

    text: str
    starts: list[int]
    ends: list[int]
    tags: list[str] | None


def words_of(text: str) -> tuple[list[int], list[int]]:
    """Starts and ends of the words of a text: letters and digits, one Chinese character or kana, one other character.

    Marks that combine with the character before them, as vowel signs and accents, are of its word.
    """
    matches = list(_word().finditer(text))
    return [match.start() for match in matches], [match.end() for match in matches]


@functools.cache
def _word() -> re.Pattern[str]:
    marks = [chr(code) for code in range(0x10000) if unicodedata.category(chr(code))[0] == "M"]
    after = f"{''.join(marks)}{JOINERS}"
    return re.compile(f"[{UNSPACED}][{after}]*|[^\\W{UNSPACED}](?:[^\\W{UNSPACED}]|[{after}])*|[^\\w\\s][{after}]*")


def from_tokens(tokens: Sequence[Any], tags: Sequence[Any], columns: tuple[str, str]) -> TaggedWords:
    """Words and their tags, joined by spaces; raises DataError for words that are none, or another number of tags."""
    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            raise DataError(f"expected words, found {shorten(token)} among them", column=columns[0])
    if len(tags) != len(tokens):
        raise DataError(f"expected a tag for each of {len(tokens)} words, found {len(tags)} tags", column=columns[1])
    return TaggedWords(" ".join(tokens), *joined(tokens), [str(tag) for tag in tags])


def joined(tokens: Sequence[str]) -> tuple[list[int], list[int]]:
    """Starts and ends of words that are joined by spaces."""
    ends = list(itertools.accumulate((len(token) for token in tokens), lambda end, length: end + 1 + length))
    return [end - len(token) for end, token in zip(ends, tokens)], ends


def from_spans(text: str, spans: Sequence[Any], column: str) -> TaggedWords:
    """The words of a text with the tags of its entities.

    Args:
        spans: mappings with ``start`` and ``end`` (characters, the end excluded) and ``label``.

    Raises:
        DataError: a span of another form, outside of the text, empty, overlapping another, or cutting a word.
    """
    starts, ends = words_of(text)
    tags, taken = [OUTSIDE] * len(starts), 0
    for span in sorted(spans, key=lambda span: _key(span, column)):
        start, end, label = (span[name] for name in SPAN_KEYS)
        shown = f"{label} {start} to {end}"
        if not 0 <= start < end <= len(text):
            raise DataError(f"entity {shown} is not within the text, which has {len(text)} characters", column=column)
        if start < taken:
            raise DataError(f"entity {shown} overlaps the one before it; a word can have one tag", column=column)
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        inside = [number for number in range(len(starts)) if starts[number] < end and ends[number] > start]
        if not inside or starts[inside[0]] != start or ends[inside[-1]] != end:
            words = " ".join(text[starts[number] : ends[number]] for number in inside)
            message = f"entity {shown} is {text[start:end]!r}, which cuts a word of {words!r}"
            raise DataError(f"{message}; set its start and end to those of whole words", column=column)
        for number in inside:
            tags[number] = f"{'B' if number == inside[0] else 'I'}-{label}"
        taken = end
    return TaggedWords(text, starts, ends, tags)


def _key(span: Any, column: str) -> tuple[int, int]:
    form = "expected entities such as {'start': 0, 'end': 5, 'label': 'person'}"
    if not isinstance(span, dict) or any(span.get(name) is None for name in SPAN_KEYS):
        raise DataError(f"{form}; found {shorten(span)}", column=column)
    start, end, label = (span[name] for name in SPAN_KEYS)
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in (start, end))
    if not whole or not isinstance(label, str) or not label.strip() or label == OUTSIDE or has_prefix(label):
        raise DataError(f"{form}; found {shorten(span)}", column=column)
    return start, end
