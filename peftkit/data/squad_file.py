"""The nested form of SQuAD's files, as rows: {"data": [{"title", "paragraphs": [{"context", "qas": [{…}]}]}]}."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peftkit.data.problems import Problems, shorten
from peftkit.errors import DataError
from peftkit.schema.types import Row

LISTS = ("paragraphs", "qas")
"""Keys of the lists inside an article and inside a paragraph."""


def is_squad(articles: Sequence[Any]) -> bool:
    """Whether the list under ``data`` holds articles."""
    first = articles[0] if articles else None
    return isinstance(first, dict) and isinstance(first.get(LISTS[0]), list)


def rows(articles: Sequence[Any], text: str, path: Path, problems: Problems) -> Iterator[Row]:
    """A row per question: ``question``, ``context``, ``title``, and the question's own keys (``id``, ``answers``, …).

    ``_path`` is the question's place among the lists, and ``_line`` the line of its id or its text.

    Args:
        text: the whole file.
    """
    lines = _Lines(text)
    for number, article in enumerate(articles):
        for place, paragraph in _inside(article, LISTS[0], f"data[{number}]", path, problems):
            for at, question in _inside(paragraph, LISTS[1], place, path, problems):
                if not isinstance(question, dict):
                    message = f"expected an object with a question, found {shorten(question)}"
                    problems.add(DataError(message, file=path, column=at))
                    continue
                yield {
                    **question,
                    "context": paragraph.get("context"),
                    "title": article.get("title"),
                    "_file": str(path), "_line": lines.of(question), "_path": at,
                }  # fmt: skip


def _inside(holder: Any, key: str, place: str, path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """The elements of a list inside an object, each with its place; another form is a problem."""
    values = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(values, list):
        message = f"expected an object with a list under '{key}', found {shorten(holder)}"
        problems.add(DataError(message, file=path, column=place))
        return
    for number, value in enumerate(values):
        yield f"{place}.{key}[{number}]", value


class _Lines:
    """Finds the lines of questions, by texts that stand in the file in their order."""

    def __init__(self, text: str) -> None:
        self._text, self._place, self._line, self._lost = text, 0, 1, False

    def of(self, question: Row) -> int:
        """The line of its id, or of its text where the id is no text.

        From the first question on that is not spelled as JSON usually is, the line before it.
        """
        texts = (value for value in (question.get("id"), question.get("question")) if isinstance(value, str))
        if self._lost or not (name := next(texts, "")):
            return self._line
        place = self._text.find(json.dumps(name), self._place)
        self._lost = place < 0  # each further search would read the rest of the file in vain
        if not self._lost:
            self._line += self._text.count("\n", self._place, place)
            self._place = place
        return self._line
