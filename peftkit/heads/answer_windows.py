"""Answers joined from windows: what a head for questions makes of the windows of a context, and texts as numbers.

A question's context may fill several windows. The best span of all of them is its answer, and its no-answer score is
the least of the windows', as in SQuAD's reference implementation (Devlin et al. 2019, arXiv:1810.04805). Outputs of a
head are arrays of numbers, so that the characters of contexts and answers are kept as such.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peftkit.schema.head import Outputs
from peftkit.schema.types import Row

if TYPE_CHECKING:
    import numpy as np

IGNORE = -100
"""What pads outputs, and stands in place of a position that is not learned."""
END = -1
"""After each answer among ``answers``, and in place of the characters of a token that has none."""
LOW = -1e9
"""The logit of a token that can be no part of an answer."""
TEXT_CHARACTERS = 300
"""Of a context in the report."""


def best_sentence(question: str, context: str) -> tuple[int, int]:
    """(first character, end) of the sentence of a text that shares most different words with a question.

    Of several the first.
    """
    import re

    from peftkit.evaluation.text_metrics import sentences

    def words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text.casefold()))

    wanted = words(question)
    return max(sentences(context), key=lambda place: len(words(context[slice(*place)]) & wanted), default=(0, 0))


@dataclass(frozen=True)
class Question:
    """A question's best answer, joined from the windows of its context."""

    row: int
    example: int
    """The first window's number among the examples."""
    gold: tuple[str, ...]
    text: str
    """Of the best answer; empty where no window can hold one, and where the outputs are not to be scored."""
    start: int
    end: int
    score: float
    probability: float
    no_answer_score: float
    """The no-answer logits less those of the best answer."""

    def of(self, text: str) -> Question:
        """The same with the answer's text."""
        return replace(self, text=text)


def questions_of(outputs: Outputs) -> list[Question]:
    """The questions in the order of their rows."""
    import numpy as np

    examples: defaultdict[int, list[int]] = defaultdict(list)
    for example, row in enumerate(np.asarray(outputs["row"]).astype(int).tolist()):
        examples[row].append(example)
    questions = []
    for row in sorted(examples):
        scores = outputs["score"][examples[row]]
        best = examples[row][int(np.argmax(scores))]
        none = float(np.min(outputs["no_answer"][examples[row]]))
        score = float(outputs["score"][best])
        start, end = (int(outputs[name][best]) if score > LOW else 0 for name in ("start", "end"))
        offset, characters = int(outputs["offset"][best]), outputs["characters"][best]
        text = text_of(characters[start - offset : end - offset]) if score > LOW else ""
        questions.append(Question(
            row, examples[row][0], texts_of(outputs["answers"][examples[row][0]]), text, start, end, score,
            float(outputs["probability"][best]) if score > LOW else 0.0, none - score,
        ))  # fmt: skip
    return questions


def rows_of(questions: Sequence[Question], outputs: Outputs, rows: Any) -> list[Row]:
    """The canonical row of each question, where ``rows`` has one for each example, or one for each row."""
    by_example = len(rows) == len(outputs["row"])
    return [rows[one.example if by_example else one.row] for one in questions]


def excerpt(row: Row, question: Question, given: str) -> str:
    """The context around the answers, with both in brackets: … was born in [gold: London] in [predicted: 1815] …"""
    context = row["context"]
    marks = [(start, start + len(text), "gold") for start, text in list(zip(row["starts"], row["answers"]))[:1]]
    if given:
        marks.append((question.start, question.end, "predicted"))
    marks.sort()
    parts, place = [], 0
    if marks and marks[0][0] > TEXT_CHARACTERS // 3:
        place = marks[0][0] - TEXT_CHARACTERS // 3
        parts.append("…")
    for start, end, what in marks:
        parts.append(f"{context[place : max(place, start)]}[{what}: {context[start:end]}]")
        place = max(place, end)
    text = "".join([*parts, context[place : place + TEXT_CHARACTERS]])
    return text if len(text) <= 2 * TEXT_CHARACTERS else f"{text[: 2 * TEXT_CHARACTERS]}…"


def codes(texts: Sequence[str]) -> list[list[int]]:
    """The numbers of the characters of each text."""
    return [[ord(character) for character in text] for text in texts]


def answer_codes(texts: Sequence[str]) -> list[int]:
    """The numbers of the characters of several texts, with END after each."""
    return [code for text in codes(texts) for code in (*text, END)]


def padded_table(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """[rows, longest row], filled up with IGNORE."""
    import numpy as np

    table = np.full((len(rows), max(1, *map(len, rows))), float(IGNORE))
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


def text_of(codes: Any) -> str:
    """The text that ``codes`` wrote."""
    return "".join(chr(int(code)) for code in codes if code >= 0)


def texts_of(codes: Any) -> tuple[str, ...]:
    """The texts that ``answer_codes`` wrote."""
    texts, letters = list[str](), list[str]()
    for code in codes:
        if code == END:
            texts.append("".join(letters))
            letters = []
        elif code >= 0:
            letters.append(chr(int(code)))
    return tuple(texts)
