"""The paired bootstrap against scipy's paired tests."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from peftkit.evaluation import paired_tests
from peftkit.schema.head import head_of
from peftkit.schema.types import TaskInfo


def mean_of(values):
    return lambda rows: float(values[rows].mean())


@pytest.fixture
def losses():
    """Two models' losses of 400 rows: rows differ much, the models little."""
    generator = np.random.default_rng(0)
    first = generator.gamma(4, 1, 400)
    return first, first + generator.normal(0.03, 0.3, 400)


def test_difference_interval_and_chance_are_those_of_the_paired_t_test(losses):
    found, expected = paired_tests.paired([mean_of(losses[0])], [mean_of(losses[1])], 400), stats.ttest_rel(*losses)
    limits = expected.confidence_interval(0.95)
    assert found["difference"] == pytest.approx(float(np.mean(losses[0] - losses[1])), abs=1e-12)
    assert found["p_value"] == pytest.approx(expected.pvalue, abs=0.02)
    assert (found["low"], found["high"]) == pytest.approx((limits.low, limits.high), abs=0.004)


def test_rows_are_paired_so_that_their_own_spread_does_not_hide_a_difference(losses):
    better = losses[0] - 0.1
    assert stats.ttest_ind(losses[0], better).pvalue > 0.3
    assert paired_tests.paired([mean_of(better)], [mean_of(losses[0])], 400)["p_value"] < 0.002


def test_equal_predictions_show_no_difference(losses):
    found = paired_tests.paired([mean_of(losses[0])], [mean_of(losses[0])], 400)
    assert (found["difference"], found["p_value"]) == (0.0, 1.0)


def test_a_lucky_seed_is_no_better_method(losses):
    level, base = 0.5, losses[0]
    lucky = [mean_of(base - level), mean_of(base + 0.7 * level), mean_of(base + 0.2 * level)]
    plain = [mean_of(base), mean_of(base + 0.3 * level), mean_of(base - 0.2 * level)]
    assert paired_tests.paired(lucky[:1], plain[:1], 400)["p_value"] < 0.002
    assert paired_tests.paired(lucky, plain, 400)["p_value"] > 0.2


def test_a_language_model_is_set_beside_its_base():
    generator = np.random.default_rng(1)
    tokens = generator.integers(5, 50, 100).astype(float)
    before, after = 3.0 * tokens, (2.5 + generator.normal(0, 0.1, 100)) * tokens

    def verdict(trained, base):
        outputs = ({"loss": loss, "weight": tokens} for loss in (trained, base))
        return head_of(TaskInfo("causal_lm")).compare(*outputs, "zero_shot", 0.95)[1]

    assert verdict(after, before).startswith("finetuning helped: loss -0.")
    assert verdict(before, after).startswith("finetuning hurt: loss +0.")
    assert "no difference" in verdict(after, after)
