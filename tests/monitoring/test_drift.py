"""Drift: false alarms are as rare as they say, what differs is noticed; judged by SciPy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics.pairwise import rbf_kernel

from peftkit.monitoring import drift
from peftkit.monitoring.drift import Difference, Measurements


def draw(generator, rows=150, shift=0.0, labels=(0.5, 0.3, 0.2)):
    return Measurements(
        {
            "tokens": generator.poisson(20 + 10 * shift, rows).astype(float),
            "confidence": generator.beta(8 - 5 * shift, 2, rows),
        },
        list(generator.choice(["a", "b", "c"], rows, p=labels)),
        generator.normal(shift, 1, (rows, 8)).astype(np.float32),
    )


def test_alarms_without_a_difference_are_as_rare_as_they_say(monkeypatch):
    monkeypatch.setattr(drift, "PERMUTATIONS", 99)
    generator, alarms = np.random.default_rng(0), 0
    for number in range(100):
        compared = drift.corrected(drift.compare(draw(generator), draw(generator), seed=number))
        alarms += any(one.drifted(0.05, 0.0) for one in compared)
    assert alarms <= stats.binom.ppf(0.999, 100, 0.05)


def test_every_kind_of_difference_is_noticed_and_named():
    generator = np.random.default_rng(1)
    compared = drift.corrected(drift.compare(draw(generator), draw(generator, shift=1.0, labels=(0.2, 0.3, 0.5))))
    assert [one.measure for one in compared] == ["tokens", "confidence", "labels", "embeddings"]
    assert all(one.drifted(0.01, 0.1) for one in compared)
    tokens, _, labels, _ = compared
    assert tokens.served > tokens.reference + 5
    assert "'a'" in labels.note or "'c'" in labels.note


def test_a_small_difference_is_none_however_many_rows_show_it():
    generator = np.random.default_rng(2)
    sides = [Measurements({"tokens": generator.normal(mean, 1, 40_000)}) for mean in (0.0, 0.08)]
    (one,) = drift.compare(*sides)
    assert one.p_value < 1e-6
    assert not one.drifted(0.01, 0.1)
    assert one.drifted(0.01, 0.0)


def test_the_discrepancy_is_that_of_its_definition():
    generator = np.random.default_rng(3)
    left, right = generator.normal(0, 1, (40, 5)), generator.normal(0.7, 1, (50, 5))
    both = np.concatenate([left, right])
    distances = ((both[:, None] - both[None]) ** 2).sum(-1)
    gamma = 1 / np.median(distances[np.triu_indices(90, 1)])
    within = [
        (rbf_kernel(side, gamma=gamma).sum() - len(side)) / (len(side) * (len(side) - 1)) for side in (left, right)
    ]
    expected = sum(within) - 2 * rbf_kernel(left, right, gamma=gamma).mean()
    effect, p_value = drift.mmd(left, right, generator)
    assert effect == pytest.approx(np.sqrt(expected))
    assert p_value == pytest.approx(1 / (drift.PERMUTATIONS + 1))


def test_labels_are_compared_by_the_chi_squared_test_and_rare_ones_together():
    counts = np.array([[60, 40, 2, 1], [30, 60, 1, 2]])
    sides = [[name for name, count in zip("abcd", row) for _ in range(count)] for row in counts]
    (one,) = drift.compare(*(Measurements(labels=side) for side in sides))
    pooled = np.column_stack([counts[:, :2], counts[:, 2:].sum(axis=1)])
    assert one.p_value == pytest.approx(stats.chi2_contingency(pooled).pvalue)
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert one.effect == pytest.approx(np.abs(shares[0] - shares[1]).sum() / 2)
    (alike,) = drift.compare(Measurements(labels=["a"] * 50), Measurements(labels=["a"] * 60))
    assert (alike.effect, alike.p_value) == (0.0, 1.0)


def test_p_values_are_corrected_as_by_holm():
    raw = [0.01, 0.04, None, 0.03]
    made = drift.corrected([Difference("x", "", 50, None, None, 0.5, p) for p in raw])
    assert [one.p_value for one in made] == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06)]


def test_too_few_rows_and_other_widths_are_reported_and_not_tested():
    generator = np.random.default_rng(4)
    few, other = draw(generator, rows=12), Measurements(embeddings=np.zeros((50, 3), dtype=np.float32))
    for one in drift.compare(draw(generator), few):
        assert (one.p_value, one.effect) == (None, None)
        assert "not tested: served 12, needed 30" in one.note
    widths = drift.compare(draw(generator), other)[-1]
    assert "3 dimensions" in widths.note
    assert widths.p_value is None
    assert not widths.drifted(0.5, 0.0)
