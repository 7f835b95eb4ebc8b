"""Intervals, calibration and tests against SciPy, scikit-learn, figures worked out by hand, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from peftkit.evaluation import intervals, paired_tests, reliability, resampling

RANDOM = np.random.default_rng(1)


@pytest.mark.parametrize(("hits", "rows"), [(0, 10), (7, 10), (10, 10), (911, 1600)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys(hits, rows, level):
    expected = stats.binomtest(hits, rows).proportion_ci(level, method="wilson")
    assert intervals.wilson(hits, rows, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_without_rows_says_nothing():
    assert intervals.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("bca", "method"), [(True, "BCa"), (False, "percentile")])
def test_the_bootstrap_is_scipys_up_to_the_draw(bca, method):
    values = RANDOM.exponential(size=60)  # skewed, so that the two methods differ
    ours = intervals.bootstrap(lambda rows: {"mean": values[rows].mean()}, 60, resamples=8000, bca=bca)["mean"]
    scipys = stats.bootstrap((values,), np.mean, n_resamples=8000, method=method, rng=np.random.default_rng(0))
    other = stats.bootstrap(
        (values,), np.mean, n_resamples=8000, method="percentile" if bca else "BCa", rng=np.random.default_rng(0)
    )
    expected = np.array(scipys.confidence_interval)
    assert ours == pytest.approx(expected, abs=0.02)
    assert np.abs(ours - expected).max() < np.abs(ours - np.array(other.confidence_interval)).max()


def test_the_bootstrap_is_seeded():
    values = RANDOM.normal(size=50)

    def drawn(seed):
        return intervals.bootstrap(lambda rows: {"mean": values[rows].mean()}, 50, seed=seed, resamples=99)

    assert drawn(3) == drawn(3) != drawn(4)


def test_the_intervals_of_macro_f1_cover_as_often_as_they_say():
    share = np.array([0.6, 0.3, 0.1])
    noise = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.2, 0.2, 0.6]])
    truth = resampling.from_confusion(share[:, None] * noise * 1e6)["f1"]
    covered = 0
    for trial in range(100):
        generator = np.random.default_rng(trial)
        gold = generator.choice(3, 150, p=share)
        found = np.array([generator.choice(3, p=noise[label]) for label in gold])
        low, high = intervals.bootstrap(
            resampling.of_classes(gold, found, np.ones(150), 3), 150, resamples=200, bca=False, confidence=0.9
        )["f1"]
        covered += low <= truth <= high
    assert 80 <= covered <= 98


def test_an_undefined_figure_has_no_interval():
    drawn = intervals.bootstrap(lambda rows: {"x": float("nan"), "y": float(rows.mean())}, 20, resamples=50)
    assert set(drawn) == {"y"}
    assert intervals.bootstrap(lambda rows: {"y": 1.0}, 1) == {}


def test_a_constant_figure_has_an_interval_of_no_width():
    assert intervals.bootstrap(lambda rows: {"x": 1.0}, 20, resamples=50) == {"x": (1.0, 1.0)}


@pytest.mark.parametrize("classes", [3, 4, 7])
def test_resampled_figures_are_scikit_learns(classes):
    # the last class is in neither side: scikit-learn leaves it out of the mean
    gold, found = RANDOM.integers(0, classes - 1, 90), RANDOM.integers(0, classes - 1, 90)
    ours = resampling.of_classes(gold, found, np.ones(90), classes)(np.arange(90))
    macro = {"average": "macro", "zero_division": 0}
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(gold, found))
    assert ours["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(gold, found))
    assert ours["precision"] == pytest.approx(sk.precision_score(gold, found, **macro))
    assert ours["recall"] == pytest.approx(sk.recall_score(gold, found, **macro))
    assert ours["f1"] == pytest.approx(sk.f1_score(gold, found, **macro))
    assert ours["f1_weighted"] == pytest.approx(sk.f1_score(gold, found, average="weighted", zero_division=0))
    assert ours["matthews_correlation"] == pytest.approx(sk.matthews_corrcoef(gold, found))
    np.testing.assert_array_equal(
        resampling.confusion(gold, found, classes), sk.confusion_matrix(gold, found, labels=range(classes))
    )


def test_resampled_figures_of_sets_are_scikit_learns():
    gold, found = RANDOM.integers(0, 2, (70, 4)), RANDOM.integers(0, 2, (70, 4))
    rows = RANDOM.integers(0, 70, 70)
    ours = resampling.of_sets(gold, found)(rows)
    gold, found = gold[rows], found[rows]
    assert ours["f1_micro"] == pytest.approx(sk.f1_score(gold, found, average="micro"))
    assert ours["f1"] == pytest.approx(sk.f1_score(gold, found, average="macro"))
    assert ours["f1_weighted"] == pytest.approx(sk.f1_score(gold, found, average="weighted"))
    assert ours["precision"] == pytest.approx(sk.precision_score(gold, found, average="macro"))
    assert ours["recall"] == pytest.approx(sk.recall_score(gold, found, average="macro"))
    assert ours["exact_match"] == pytest.approx(sk.accuracy_score(gold, found))
    assert ours["hamming_loss"] == pytest.approx(sk.hamming_loss(gold, found))


def test_resampled_figures_of_numbers_are_scipys():
    truth, guess = RANDOM.normal(size=50).round(1), RANDOM.normal(size=50).round(1)  # with ties
    ours = resampling.of_numbers(truth, guess)(np.arange(50))
    assert ours["mse"] == pytest.approx(sk.mean_squared_error(truth, guess))
    assert ours["mae"] == pytest.approx(sk.mean_absolute_error(truth, guess))
    assert ours["r2"] == pytest.approx(sk.r2_score(truth, guess))
    assert ours["pearsonr"] == pytest.approx(stats.pearsonr(truth, guess).statistic)
    assert ours["spearmanr"] == pytest.approx(stats.spearmanr(truth, guess).statistic)


def test_calibration_error_by_hand():
    # bins (0.6, 0.8] and (0.8, 1]: |1/2 − 0.7| · 2/4 + |1 − 0.95| · 2/4
    confidence, correct = np.array([0.65, 0.75, 0.9, 1.0]), np.array([True, False, True, True])
    assert reliability.expected_calibration_error(confidence, correct, bins=5) == pytest.approx(0.125)
    bins = reliability.reliability(confidence, correct, 5)
    assert [(round(one.low, 1), round(one.high, 1), one.count) for one in bins] == [(0.6, 0.8, 2), (0.8, 1.0, 2)]


def test_calibrated_predictions_have_the_curve_of_scikit_learn():
    from sklearn.calibration import calibration_curve

    confidence = RANDOM.uniform(0, 1, 4000)
    correct = RANDOM.uniform(0, 1, 4000) < confidence
    bins = reliability.reliability(confidence, correct, 10)
    share, mean = calibration_curve(correct, confidence, n_bins=10)
    np.testing.assert_allclose([one.accuracy for one in bins], share)
    np.testing.assert_allclose([one.confidence for one in bins], mean)
    assert reliability.expected_calibration_error(confidence, correct) < 0.03


def test_an_edge_belongs_to_the_bin_below():
    assert [one.high for one in reliability.reliability(np.array([0.0, 0.5]), np.array([True, True]), 2)] == [0.5]


def test_mcnemar_by_hand():
    # 10 rows only the first has right, 2 only the second: P(X ≤ 2 or X ≥ 10 | 12, ½) = 2 · 79/4096
    first = np.array([True] * 10 + [False] * 2 + [True] * 8)
    second = np.array([False] * 10 + [True] * 2 + [True] * 8)
    found = paired_tests.mcnemar(first, second)
    assert found["p_value"] == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert (found["only_first"], found["only_second"], found["difference"]) == (10, 2, 0.4)
    assert found["low"] < 0.4 < found["high"]
    assert paired_tests.verdict(found, "zero_shot") == "finetuning helped: +40.0 points against zero shot (p = 0.039)"


def test_mcnemar_of_equals_finds_nothing():
    same = np.array([True, False, True])
    found = paired_tests.mcnemar(same, same)
    assert (found["p_value"], found["low"], found["high"]) == (1.0, 0.0, 0.0)
    assert paired_tests.verdict(found, "majority").startswith("no difference")


def test_the_interval_of_the_difference_covers_as_often_as_it_says():
    covered = 0
    for trial in range(300):
        generator = np.random.default_rng(trial)
        first, second = generator.random(400) < 0.8, generator.random(400) < 0.7
        found = paired_tests.mcnemar(first, second, 0.9)
        covered += found["low"] <= 0.1 <= found["high"]
    assert 0.85 <= covered / 300 <= 0.95
