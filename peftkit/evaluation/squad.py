"""Exact match and F1 of answers, as the official scripts of SQuAD 1.1 and 2.0 compute them.

Rajpurkar et al. 2016 (arXiv:1606.05250) and 2018 (arXiv:1806.03822). Answers are compared without case, punctuation
and English articles; F1 is over their words. Of several correct answers the best fitting counts. Values are shares,
where the scripts write percent.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

METRICS = ("exact_match", "f1")
"""Over all questions."""
PARTS = ("has_answer_exact_match", "has_answer_f1", "no_answer_accuracy")
"""Over the questions with an answer, and those without, of which the script calls the last NoAns_exact and NoAns_f1."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(text: str) -> str:
    """Without case, ASCII punctuation, articles and repeated spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def score(gold: Sequence[str], predicted: str, *, version: int) -> tuple[float, float]:
    """(exact match, F1) of one answer.

    Args:
        gold: the correct answers; none for a question without an answer.
        predicted: the empty string for no answer.
        version: 1 or 2, of the script. In version 2 two empty answers have F1 1, and correct answers that are empty
            once they are normalized are left out.
    """
    known = [normalized(text) for text in gold]
    if version == 2:
        known = [text for text in known if text] or [""]
    answer = normalized(predicted)
    exact = max((float(text == answer) for text in known), default=0.0)
    return exact, max((_f1(text.split(), answer.split(), version) for text in known), default=0.0)


def _f1(gold: list[str], predicted: list[str], version: int) -> float:
    if version == 2 and not (gold and predicted):
        return float(gold == predicted)
    same = sum((Counter(gold) & Counter(predicted)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True)
class Scores:
    """Scores of questions, [questions] each."""

    exact_match: np.ndarray
    f1: np.ndarray
    has_answer: np.ndarray
    """Whether the question has an answer, bool."""
    version: int

    @classmethod
    def of(cls, gold: Sequence[Sequence[str]], predicted: Sequence[str], version: int) -> Scores:
        """Scores each question's prediction."""
        import numpy as np

        pairs = [score(answers, text, version=version) for answers, text in zip(gold, predicted, strict=True)]
        exact, f1 = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        return cls(exact, f1, np.array([bool(answers) for answers in gold], dtype=bool), version)

    def metrics(self, rows: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """``METRICS`` of a choice of questions, and in version 2 ``PARTS``; 0 where there is no such question."""
        exact, f1, has_answer = self.exact_match[rows], self.f1[rows], self.has_answer[rows]
        values = {"exact_match": _mean(exact), "f1": _mean(f1)}
        if self.version == 1:
            return values
        return values | {
            "has_answer_exact_match": _mean(exact[has_answer]),
            "has_answer_f1": _mean(f1[has_answer]),
            "no_answer_accuracy": _mean(f1[~has_answer]),
        }


def names(version: int) -> tuple[str, ...]:
    """The metrics of a version."""
    return METRICS if version == 1 else (*METRICS, *PARTS)


def best_threshold(f1: np.ndarray, has_answer: np.ndarray, no_answer_score: np.ndarray) -> float:
    """The no-answer score over which giving no answer brings the highest F1: the script's best_f1_thresh.

    Args:
        f1: of each question's best answer, whether or not it was to be given.
        has_answer: whether the question has one.
        no_answer_score: larger where an answer is less likely.

    Returns:
        The score of the last question that is answered; less than all scores where none should be.
    """
    import numpy as np

    order = np.argsort(no_answer_score, kind="stable")
    gains = (f1 - ~has_answer)[order]  # without an answer given, the questions that have none score 1
    totals = np.cumsum(gains)
    scores = no_answer_score[order]
    is_last = np.append(scores[1:] != scores[:-1], True)  # questions with the same score are answered together
    totals = np.where(is_last, totals, -np.inf)
    best = int(totals.argmax())
    return float(scores[best]) if totals[best] > 0 else float(scores[0]) - 1.0


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
