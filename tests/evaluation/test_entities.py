"""Entity scores against seqeval, where it is installed, and against values worked out by hand."""

import random

import numpy as np
import pytest

from peftkit.evaluation.entities import as_bio, count, entities

GOLD = ["B-PER I-PER O B-LOC", "O O B-ORG", "B-LOC O B-PER"]
PREDICTED = ["B-PER O O B-LOC", "O B-ORG I-ORG", "B-PER O B-PER"]


def split(*sentences):
    return [sentence.split() for sentence in sentences]


def test_tags_of_every_scheme_are_the_same_entities():
    bio = "B-PER I-PER O B-LOC B-LOC O".split()
    for tags in ("I-PER I-PER O I-LOC B-LOC O", "B-PER E-PER O S-LOC S-LOC O", "B-PER L-PER O U-LOC U-LOC O"):
        assert as_bio(tags.split()) == bio
        assert entities(tags.split()) == [(0, 2, "PER"), (3, 4, "LOC"), (4, 5, "LOC")]
    assert as_bio("DET NOUN VERB".split()) == ["DET", "NOUN", "VERB"]
    assert entities("DET O".split()) == [(0, 1, "DET")]


def test_scores_are_those_worked_out_by_hand():
    """Two of five entities are right, as seqeval counts them; a shorter one and a longer one overlap theirs."""
    counts = count(split(*GOLD), split(*PREDICTED), ("LOC", "ORG", "PER"))
    expected = {"precision": 2 / 5, "recall": 2 / 5, "f1": 2 / 5, "f1_macro": (2 / 3 + 0 + 2 / 5) / 3,
                "f1_overlap": 4 / 5, "accuracy": 6 / 10}  # fmt: skip
    assert counts.metrics() == pytest.approx(expected)
    both = counts.metrics(np.array([0, 0]))
    assert both == pytest.approx(counts.metrics(np.array([0])))
    rows = {row["label"]: (row["rows"], row["predicted"]) for row in counts.per_type()}
    assert rows == {"LOC": (2, 1), "ORG": (1, 1), "PER": (2, 3)}


def test_scores_equal_seqevals():
    seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    draw, kinds = random.Random(0), ("LOC", "ORG", "PER")
    tags = ["O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in kinds)]
    gold, predicted = ([[draw.choice(tags) for _ in range(1 + row % 9)] for row in range(60)] for _ in range(2))
    metrics = count(gold, predicted, kinds).metrics()
    assert metrics["f1"] == pytest.approx(seqeval.f1_score(gold, predicted))
    assert metrics["precision"] == pytest.approx(seqeval.precision_score(gold, predicted))
    assert metrics["recall"] == pytest.approx(seqeval.recall_score(gold, predicted))
    assert metrics["f1_macro"] == pytest.approx(seqeval.f1_score(gold, predicted, average="macro"))
    assert metrics["accuracy"] == pytest.approx(seqeval.accuracy_score(gold, predicted))
