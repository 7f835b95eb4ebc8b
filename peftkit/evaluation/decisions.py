"""What a model answers for each row: one class, several labels, or a number; and how such answers are scored.

    decided = Classes.from_logits(logits, labels)
    score(decided, gold, ("accuracy", "f1"))          # {"accuracy": …, "f1": …}
    decided.details(gold)                              # {"per_class": …, "confusion": …, "calibration": …}

Heads choose the kind of answer; nothing here knows a head. ``gold`` always has the form of ``Decisions.predicted``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from peftkit.errors import RecipeError
from peftkit.evaluation import metrics, resampling
from peftkit.evaluation.intervals import Statistics
from peftkit.evaluation.reliability import expected_calibration_error, reliability

PAIRS = 1000
"""Rows of a regression whose gold and predicted numbers are kept for a plot."""
TEXT_CHARACTERS = 500
"""Characters of a text that are kept in a report."""


@dataclass(frozen=True)
class Decisions(ABC):
    """The answers for the rows of a split."""

    predicted: np.ndarray
    """[rows] class ids; [rows, labels] 0/1; or [rows] numbers."""
    probabilities: np.ndarray | None = None
    """[rows, labels]; None where they are not known."""
    labels: tuple[str, ...] = ()

    holds: ClassVar[metrics.Holds]
    """What an answer is, for the metrics."""

    @classmethod
    @abstractmethod
    def from_logits(cls, logits: np.ndarray, labels: tuple[str, ...]) -> Decisions:
        """Answers from logits [rows, width]."""

    @abstractmethod
    def statistics(self, gold: np.ndarray) -> Statistics:
        """Metrics of a choice of rows, for the bootstrap."""

    @abstractmethod
    def details(self, gold: np.ndarray) -> dict[str, Any]:
        """What a report shows besides metrics, as JSON."""

    @abstractmethod
    def severity(self, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[rows] whether the answer is wrong, and how bad a wrong one is."""

    @classmethod
    @abstractmethod
    def answer(cls, value: Any, labels: Sequence[str]) -> Any:
        """One row of ``predicted`` or ``gold`` as JSON: names of labels, or a number."""

    @classmethod
    @abstractmethod
    def parse(cls, answers: Sequence[Any], labels: Sequence[str]) -> np.ndarray:
        """The inverse of ``answer`` for all rows."""

    def right(self, gold: np.ndarray) -> np.ndarray | None:
        """[rows] whether the answer is right; None where answers are only more or less close."""
        return ~self.severity(gold)[0]

    def row(self, number: int, gold: np.ndarray) -> dict[str, Any]:
        """Gold and predicted answer of one row as JSON."""
        answers = (self.answer(values[number], self.labels) for values in (gold, self.predicted))
        return dict(zip(("gold", "predicted"), answers))

    def mistakes(self, gold: np.ndarray, rows: Any, count: int) -> list[dict[str, Any]]:
        """At most ``count`` wrong rows, the worst first: wrong and confident, or far off.

        Args:
            rows: canonical rows by number: a ``datasets.Dataset`` or a list.

        Returns:
            For each ``text``, ``gold``, ``predicted``, ``confidence`` or ``error``, ``file``, ``line``.
        """
        (wrong, severity), entries = self.severity(gold), []
        for number in np.argsort(-severity, kind="stable")[: min(count, int(wrong.sum()))].tolist():
            row = rows[number]
            text = " ⏐ ".join(row[name] for name in ("text", "text_pair") if name in row)
            text = text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]}…"
            entry = {"text": text, **self.row(number, gold), **self._measure(number, gold, severity)}
            entries.append({**entry, "file": row.get("_file"), "line": row.get("_line")})
        return entries

    def _measure(self, number: int, gold: np.ndarray, severity: np.ndarray) -> dict[str, float]:
        return {"confidence": float(severity[number])}


class Classes(Decisions):
    """One class per row."""

    holds = "classes"

    @classmethod
    def from_logits(cls, logits: np.ndarray, labels: tuple[str, ...]) -> Classes:
        """The likeliest class, and the softmax of logits [rows, labels]."""
        logits = np.asarray(logits, dtype=np.float64)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return cls(logits.argmax(axis=1), shifted / shifted.sum(axis=1, keepdims=True), labels)

    @property
    def confidence(self) -> np.ndarray:
        """[rows]: the probability of the predicted class."""
        assert self.probabilities is not None
        return self.probabilities.max(axis=1)

    def statistics(self, gold: np.ndarray) -> Statistics:
        confidence = None if self.probabilities is None else self.confidence
        return resampling.of_classes(gold, self.predicted, confidence, len(self.labels))

    def details(self, gold: np.ndarray) -> dict[str, Any]:
        ids = np.arange(len(self.labels))
        return {
            "per_class": _per_class(gold[:, None] == ids, self.predicted[:, None] == ids, self.labels),
            "confusion": resampling.confusion(gold, self.predicted, len(self.labels)).tolist(),
            "calibration": {"bins": [asdict(one) for one in reliability(self.confidence, self.predicted == gold)]},
        }

    def severity(self, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wrong = self.predicted != gold
        return wrong, wrong if self.probabilities is None else np.where(wrong, self.confidence, -1.0)

    @classmethod
    def answer(cls, value: Any, labels: Sequence[str]) -> str:
        return labels[int(value)]

    @classmethod
    def parse(cls, answers: Sequence[Any], labels: Sequence[str]) -> np.ndarray:
        return np.array([labels.index(answer) for answer in answers])


class LabelSets(Decisions):
    """Any number of labels per row."""

    holds = "sets"

    @classmethod
    def from_logits(cls, logits: np.ndarray, labels: tuple[str, ...], threshold: float = 0.5) -> LabelSets:
        """The labels whose sigmoid of logits [rows, labels] reaches the threshold."""
        probabilities = 0.5 * (1 + np.tanh(np.asarray(logits, dtype=np.float64) / 2))
        return cls((probabilities >= threshold).astype(np.int64), probabilities, labels)

    def statistics(self, gold: np.ndarray) -> Statistics:
        return resampling.of_sets(gold, self.predicted)

    def details(self, gold: np.ndarray) -> dict[str, Any]:
        return {"per_class": _per_class(gold, self.predicted, self.labels)}

    def severity(self, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A row is as bad as the wrong decision that it was most confident of."""
        differs = self.predicted != gold
        wrong = differs.any(axis=1)
        if self.probabilities is None:
            return wrong, wrong
        each = np.where(self.predicted == 1, self.probabilities, 1 - self.probabilities)
        return wrong, np.where(wrong, np.where(differs, each, 0.0).max(axis=1), -1.0)

    @classmethod
    def answer(cls, value: Any, labels: Sequence[str]) -> list[str]:
        return [name for name, given in zip(labels, value) if given]

    @classmethod
    def parse(cls, answers: Sequence[Any], labels: Sequence[str]) -> np.ndarray:
        return np.array([[int(label in answer) for label in labels] for answer in answers])


class Numbers(Decisions):
    """A number per row."""

    holds = "numbers"

    @classmethod
    def from_logits(cls, logits: np.ndarray, labels: tuple[str, ...]) -> Numbers:
        """Logits [rows, 1] are the numbers themselves."""
        logits = np.asarray(logits, dtype=np.float64)
        return cls(logits.reshape(len(logits)), None, labels)

    def statistics(self, gold: np.ndarray) -> Statistics:
        return resampling.of_numbers(gold, self.predicted)

    def details(self, gold: np.ndarray) -> dict[str, Any]:
        chosen = np.linspace(0, len(gold) - 1, min(PAIRS, len(gold))).astype(int)
        return {"pairs": [[float(gold[row]), float(self.predicted[row])] for row in chosen]}

    def severity(self, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        error = np.abs(self.predicted - gold)
        return error > 0, error

    def right(self, gold: np.ndarray) -> None:
        return None

    @classmethod
    def answer(cls, value: Any, labels: Sequence[str]) -> float:
        return float(value)

    @classmethod
    def parse(cls, answers: Sequence[Any], labels: Sequence[str]) -> np.ndarray:
        return np.array(answers, dtype=float)

    def _measure(self, number: int, gold: np.ndarray, severity: np.ndarray) -> dict[str, float]:
        return {"error": float(self.predicted[number] - gold[number])}


def mean_loss(outputs: Mapping[str, np.ndarray]) -> float:
    """Σ loss ÷ Σ weight, as in training; NaN without rows."""
    weight = float(np.sum(outputs["weight"], dtype=np.float64))
    return float(np.sum(outputs["loss"], dtype=np.float64)) / weight if weight else float("nan")


def score(decided: Decisions, gold: np.ndarray, names: Iterable[str]) -> dict[str, float]:
    """Named metrics of all rows, ``loss`` left out; NaN without rows.

    Raises:
        RecipeError, HubError: see ``metrics.compute_metric``.
    """
    values: dict[str, float] = {}
    for name in dict.fromkeys(name for name in names if name != "loss"):
        if name == "calibration_error":
            if not isinstance(decided, Classes):
                raise RecipeError("metric 'calibration_error' needs one label per row; leave it out")
            values[name] = expected_calibration_error(decided.confidence, decided.predicted == gold)
        elif len(gold):
            values |= metrics.compute_metric(name, decided.predicted, gold, decided.holds)
        else:
            values[name] = float("nan")
    return values


def _per_class(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each label by scikit-learn, with the rows that have it and that were given it."""
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(gold.astype(int), predicted.astype(int), average=None, zero_division=0)
    if len(labels) == 1:  # of one column scikit-learn scores the classes 0 and 1
        scores = [score[-1:] for score in scores]
    return [
        {"label": label, "precision": float(precision), "recall": float(recall), "f1": float(f1), "rows": int(rows),
         "predicted": int(given)}
        for label, precision, recall, f1, rows, given in zip(labels, *scores, predicted.sum(axis=0), strict=True)
    ]  # fmt: skip
