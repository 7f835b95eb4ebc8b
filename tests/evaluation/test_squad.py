"""Exact match and F1 next to what the official script of SQuAD 2.0 gives (as transformers 4.50 ships it)."""

import numpy as np
import pytest

from peftkit.evaluation import squad

CASES = [
    (["London"], "london.", 1, 1.0),
    (["the Queen", "Queen Victoria"], "Queen", 1, 1.0),
    (["U.S."], "US", 1, 1.0),
    (["in 1990"], "the 1990s", 0, 0.0),
    ([], "", 1, 1.0),
    ([], "the", 1, 1.0),
    ([], "Paris", 0, 0.0),
    (["the"], "a", 1, 1.0),
    (["a", "cat"], "the cat-dog", 0, 0.0),
    (["cat dog"], "cat-dog", 0, 0.0),
    (["théâtre"], "Le théâtre", 0, 0.666667),
    (["“quote”"], "quote", 0, 0.0),
    (["AN apple a day"], "apple  day", 1, 1.0),
    (["10,000"], "10000 people", 0, 0.666667),
    (["é\xa0b"], "é b", 1, 1.0),
    (["the end of the world"], "end of world, the", 1, 1.0),
    (["x x y"], "x y y", 0, 0.666667),
    (["ﬁn"], "fin", 0, 0.0),
    (["İstanbul"], "istanbul", 0, 0.0),
    (["..."], "", 1, 1.0),
    (["one", "two three"], "three two", 0, 1.0),
]
"""(correct answers, prediction, exact match, F1), the numbers from the script."""
SCRIPT = {
    "exact_match": 47.61904761904762, "f1": 61.904761904761905, "has_answer_exact_match": 44.44444444444444,
    "has_answer_f1": 61.111111111111114, "no_answer_accuracy": 66.66666666666667,
}  # fmt: skip
NO_ANSWER_SCORES = [0.94, -1.4, -0.68, 0.37, -0.02, 0.93, 1.18, -0.83, -1.31, 0.19, 0.99, -0.65, -0.33, 1.65, -0.56,
                    -0.51, 2.4, -1.53, 0.8, -2.0, -0.6]  # fmt: skip


@pytest.mark.parametrize(("gold", "predicted", "exact", "f1"), CASES)
def test_a_question_has_the_scripts_scores(gold, predicted, exact, f1):
    assert squad.score(gold, predicted, version=2) == pytest.approx((exact, f1), abs=1e-6)


def test_all_questions_have_the_scripts_scores():
    scores = squad.Scores.of([case[0] for case in CASES], [case[1] for case in CASES], 2)
    assert {name: 100 * value for name, value in scores.metrics().items()} == pytest.approx(SCRIPT, rel=1e-9)
    only = scores.metrics(np.array([4, 5]))
    assert (only["no_answer_accuracy"], only["has_answer_f1"]) == (1.0, 0.0)


def test_version_1_gives_no_points_for_the_words_of_an_empty_answer():
    """As in the script of SQuAD 1.1: equal texts match exactly, and have no words in common."""
    assert squad.score(["the"], "a", version=1) == (1.0, 0.0)
    assert squad.score(["the", "London"], "London", version=1) == (1.0, 1.0)
    assert set(squad.Scores.of([["a b"]], ["b"], 1).metrics()) == {"exact_match", "f1"}


def test_the_threshold_is_the_one_of_the_highest_f1():
    gold, predicted = [case[0] for case in CASES], [case[1] or "word" for case in CASES]
    scores, none = squad.Scores.of(gold, predicted, 2), np.array(NO_ANSWER_SCORES)

    def f1(threshold):
        given = ["" if score > threshold else text for score, text in zip(none, predicted)]
        return squad.Scores.of(gold, given, 2).metrics()["f1"]

    threshold = squad.best_threshold(scores.f1, scores.has_answer, none)
    assert f1(threshold) == max(f1(value) for value in [*none, none.min() - 1])
    hopeless = squad.best_threshold(np.zeros(3), np.array([True, False, False]), np.array([0.5, -1.0, 2.0]))
    assert hopeless < -1.0
    # questions with the same score are answered together or not at all
    tied = squad.best_threshold(np.array([1.0, 0.0, 0.0]), np.array([True, False, False]), np.array([0.0, 0.0, 0.0]))
    assert tied < 0.0
