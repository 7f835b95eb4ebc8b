"""Text metrics against rouge-score and sacreBLEU called directly, offline."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from peftkit.evaluation import text_metrics

FOUND = ["the cat sat on the mat", "An apple.", "", "it rained\nall day long", "Übung macht den Meister"]
WANTED = ["a cat sat on a mat", "apple", "something", "it rained all day\nand all night", "Übung macht Meister"]


def test_rouge_is_rouge_scores_mean():
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    rows = [scorer.score(wanted, found) for found, wanted in zip(FOUND, WANTED)]
    figures = text_metrics.score(FOUND, WANTED)
    for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert figures[kind] == pytest.approx(sum(row[kind].fmeasure for row in rows) / len(rows))
    assert 0 < figures["rouge2"] < figures["rouge1"] < 1


def test_chrf_is_sacrebleus():
    expected = sacrebleu.corpus_chrf(FOUND, [WANTED]).score / 100
    assert text_metrics.score(FOUND, WANTED)["chrf"] == pytest.approx(expected)
    assert text_metrics.score(WANTED, WANTED)["chrf"] == pytest.approx(1)


def test_exact_match_and_token_f1_on_worked_rows():
    figures = text_metrics.score(FOUND, WANTED)
    # normalized: "cat sat on mat" twice, "apple" twice, "" and "something", 4 of 5 and 7 words, 3 of 4 and 3 words
    assert figures["exact_match"] == pytest.approx(2 / 5)
    assert figures["token_f1"] == pytest.approx((1 + 1 + 0 + 2 * 4 / (5 + 7) + 2 * 3 / (4 + 3)) / 5)


def test_metrics_of_a_choice_of_rows_are_those_of_their_texts():
    rows = np.array([3, 0, 3, 4])
    chosen = [[texts[row] for row in rows] for texts in (FOUND, WANTED)]
    drawn = text_metrics.statistics(FOUND, WANTED)(rows)
    assert drawn == pytest.approx(text_metrics.score(*chosen))
    assert drawn["bleu"] == pytest.approx(sacrebleu.corpus_bleu(chosen[0], [chosen[1]]).score / 100)
    assert drawn["chrf"] == pytest.approx(sacrebleu.corpus_chrf(chosen[0], [chosen[1]]).score / 100)
    assert 0 < drawn["bleu"] < 1


def test_sentences():
    text = "One. Two of 3.5 parts!\n  Three? and a rest "
    assert [text[slice(*place)] for place in text_metrics.sentences(text)] == [
        "One.", "Two of 3.5 parts!", "Three?", "and a rest"
    ]  # fmt: skip
    assert text_metrics.sentences(" \n ") == []
