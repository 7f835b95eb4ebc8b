"""Text metrics against rouge-score and sacreBLEU called directly, offline."""

from __future__ import annotations

import math

import evaluate
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from peftkit.errors import DataError, RecipeError
from peftkit.evaluation import text_metrics

FOUND = ["the cat sat on the mat", "An apple.", "", "it rained\nall day long", "Übung macht den Meister"]
WANTED = ["a cat sat on a mat", "apple", "something", "it rained all day\nand all night", "Übung macht Meister"]


def test_rouge_is_rouge_scores_mean():
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    rows = [scorer.score(wanted, found) for found, wanted in zip(FOUND, WANTED)]
    figures = text_metrics.load("rouge").compute(predictions=FOUND, references=WANTED)
    assert set(figures) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    for kind, value in figures.items():
        assert value == pytest.approx(sum(row[kind].fmeasure for row in rows) / len(rows))
    assert 0 < figures["rouge2"] < figures["rouge1"] < 1


def test_bleu_and_chrf_are_sacrebleus():
    figures = text_metrics.score(FOUND, WANTED, ("bleu", "chrf"))
    assert figures["bleu"] == pytest.approx(sacrebleu.corpus_bleu(FOUND, [WANTED]).score / 100)
    assert figures["chrf"] == pytest.approx(sacrebleu.corpus_chrf(FOUND, [WANTED]).score / 100)
    assert text_metrics.score(WANTED, WANTED, ("bleu", "chrf")) == pytest.approx({"bleu": 1, "chrf": 1})


def test_exact_match_and_token_f1_on_worked_rows():
    figures = text_metrics.score(FOUND, WANTED, ("exact_match", "token_f1"))
    # normalized: "cat sat on mat" twice, "apple" twice, "" and "something", 4 of 5 and 7 words, 3 of 4 and 3 words
    assert figures["exact_match"] == pytest.approx(2 / 5)
    assert figures["token_f1"] == pytest.approx((1 + 1 + 0 + 2 * 4 / (5 + 7) + 2 * 3 / (4 + 3)) / 5)


def test_they_are_evaluate_modules_that_take_batches():
    metric = text_metrics.load("exact_match")
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=["Yes."], references=["yes"])
    metric.add_batch(predictions=["no"], references=["yes"])
    assert metric.compute() == {"exact_match": 0.5}


def test_perplexity():
    assert text_metrics.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert text_metrics.perplexity(1e6, 1) == math.inf
    assert math.isnan(text_metrics.perplexity(0, 0))


def test_wrong_names_and_lengths():
    with pytest.raises(RecipeError, match="did you mean 'rouge'"):
        text_metrics.score([], [], ("rogue",))
    with pytest.raises(DataError, match="found 1 and 2"):
        text_metrics.score(["a"], ["a", "b"])
    assert text_metrics.score([], []) == {}
