"""Entities in tagged words: reading tags as spans, and precision, recall and F1 over them.

Tags are BIO: B-TYPE begins an entity, I-TYPE continues it, O is outside (Ramshaw & Marcus 1995, cmp-lg/9505040). As in
the CoNLL evaluation and seqeval's default mode, I-TYPE that continues nothing begins an entity, too; E- and L- end
one, S- and U- are one of a single word. An entity is right if its words and its type are those of the gold (exact), or
if it shares a word with a gold entity of its type (overlap). Tags without such prefixes, as of parts of speech, are
entities of one word each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from peftkit.evaluation.intervals import Statistics

OUTSIDE = "O"
PREFIXES = frozenset("BIESLU")
STARTS, ENDS = frozenset("BSU"), frozenset("ESLU")
METRICS = ("precision", "recall", "f1", "f1_macro", "f1_overlap", "accuracy")
"""Over entities, summed over types (micro) but for ``f1_macro``; ``accuracy`` is over words."""


class Entity(NamedTuple):
    """Words ``first`` to ``last``, the last one excluded, of one type."""

    first: int
    last: int
    type: str


def type_of(tag: str) -> str:
    """The type of a tag: LOC of B-LOC, O of O, and a tag without a prefix itself."""
    return tag[2:] if has_prefix(tag) else tag


def has_prefix(tag: str) -> bool:
    """Whether a tag is of the form B-TYPE."""
    return len(tag) > 2 and tag[0] in PREFIXES and tag[1] == "-"


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence's tags, in order."""
    spans: list[Entity] = []
    start, current = 0, ""
    for place, tag in enumerate(tags):
        inside = has_prefix(tag)
        if current and not (inside and tag[0] not in STARTS and tag[2:] == current):
            spans.append(Entity(start, place, current))
            current = ""
        if inside and not current:
            start, current = place, tag[2:]
        if inside and tag[0] in ENDS:
            spans.append(Entity(start, place + 1, current))
            current = ""
        if not inside and tag != OUTSIDE:
            spans.append(Entity(place, place + 1, tag))
    if current:
        spans.append(Entity(start, len(tags), current))
    return spans


def as_bio(tags: Sequence[str]) -> list[str]:
    """The same entities in BIO, from IOB1, BIO, BIOES or BILOU; tags without prefixes stay as they are."""
    if not any(has_prefix(tag) for tag in tags):
        return list(tags)
    bio = [OUTSIDE] * len(tags)
    for first, last, kind in entities(tags):
        bio[first] = f"B-{kind}"
        bio[first + 1 : last] = [f"I-{kind}"] * (last - first - 1)
    return bio


@dataclass(frozen=True)
class Counts:
    """What each sentence adds, [sentences, types] each; ``words`` and ``right`` are [sentences]."""

    types: tuple[str, ...]
    gold: np.ndarray
    predicted: np.ndarray
    hits: np.ndarray
    """Predicted entities that are right."""
    touched: np.ndarray
    """Predicted entities that overlap a gold one of their type."""
    reached: np.ndarray
    """Gold entities that a predicted one of their type overlaps."""
    words: np.ndarray
    right: np.ndarray
    """Words with the gold tag."""

    def metrics(self, rows: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """``METRICS`` of a choice of sentences; 0 where nothing was predicted or nothing is there."""
        gold, predicted, hits = (one[rows].sum(axis=0) for one in (self.gold, self.predicted, self.hits))
        present = gold + predicted > 0
        f1 = 2 * hits[present] / (gold + predicted)[present]
        return {
            "precision": _ratio(hits.sum(), predicted.sum()),
            "recall": _ratio(hits.sum(), gold.sum()),
            "f1": _ratio(2 * hits.sum(), gold.sum() + predicted.sum()),
            "f1_macro": float(f1.mean()) if len(f1) else 0.0,
            "f1_overlap": _harmonic(
                _ratio(self.touched[rows].sum(), predicted.sum()), _ratio(self.reached[rows].sum(), gold.sum())
            ),
            "accuracy": _ratio(self.right[rows].sum(), self.words[rows].sum()),
        }

    def statistics(self) -> Statistics:
        """The metrics as a function of sentences, for the bootstrap."""
        return self.metrics

    def per_type(self) -> list[dict[str, object]]:
        """Precision, recall and F1 of each type, with its entities (``rows``) and how many were predicted."""
        gold, predicted, hits = (one.sum(axis=0) for one in (self.gold, self.predicted, self.hits))
        return [
            {"label": kind, "precision": _ratio(hits[n], predicted[n]), "recall": _ratio(hits[n], gold[n]),
             "f1": _ratio(2 * hits[n], gold[n] + predicted[n]), "rows": int(gold[n]), "predicted": int(predicted[n])}
            for n, kind in enumerate(self.types)
        ]  # fmt: skip


def count(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], types: Sequence[str]) -> Counts:
    """Counts of sentences, from their gold and predicted tags, word by word; ``types`` are those of all tags."""
    import numpy as np

    number = {kind: index for index, kind in enumerate(types)}
    tables = {name: np.zeros((len(gold), len(types)), dtype=np.int64)
              for name in ("gold", "predicted", "hits", "touched", "reached")}  # fmt: skip
    words, right = np.zeros(len(gold), dtype=np.int64), np.zeros(len(gold), dtype=np.int64)
    for row, (truth, guess) in enumerate(zip(gold, predicted, strict=True)):
        wanted, given = entities(truth), entities(guess)
        exact = set(wanted)
        for entity in given:
            tables["predicted"][row, number[entity.type]] += 1
            tables["hits"][row, number[entity.type]] += entity in exact
            tables["touched"][row, number[entity.type]] += _overlaps(entity, wanted)
        for entity in wanted:
            tables["gold"][row, number[entity.type]] += 1
            tables["reached"][row, number[entity.type]] += _overlaps(entity, given)
        words[row] = len(truth)
        right[row] = sum(one == other for one, other in zip(truth, guess, strict=True))
    return Counts(tuple(types), **tables, words=words, right=right)


def _overlaps(entity: Entity, others: Sequence[Entity]) -> bool:
    return any(
        other.type == entity.type and other.first < entity.last and entity.first < other.last for other in others
    )


def _ratio(part: float, total: float) -> float:
    return float(part / total) if total else 0.0


def _harmonic(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second else 0.0
