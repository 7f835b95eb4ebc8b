"""Metrics by name against scikit-learn and SciPy, without a network."""

from __future__ import annotations

from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from peftkit.errors import HubError, RecipeError
from peftkit.evaluation import decisions, metrics
from peftkit.evaluation.direction import greater_is_better
from peftkit.schema.head import head_of
from peftkit.schema.recipe import EvaluationConfig
from peftkit.schema.types import TaskInfo

SINGLE = TaskInfo("single_label_classification", ("a", "b", "c"))
MULTI = TaskInfo("multi_label_classification", ("a", "b", "c"))
NUMBER = TaskInfo("regression", ("score",))
RANDOM = np.random.default_rng(0)
GOLD, FOUND = RANDOM.integers(0, 3, 80), RANDOM.integers(0, 3, 80)
GOLD_SETS, FOUND_SETS = RANDOM.integers(0, 2, (80, 3)), RANDOM.integers(0, 2, (80, 3))
TRUTH, GUESS = RANDOM.normal(size=80), RANDOM.normal(size=80)

CLASSES = {
    "accuracy": sk.accuracy_score(GOLD, FOUND),
    "balanced_accuracy": sk.balanced_accuracy_score(GOLD, FOUND),
    "precision": sk.precision_score(GOLD, FOUND, average="macro"),
    "recall": sk.recall_score(GOLD, FOUND, average="macro"),
    "f1": sk.f1_score(GOLD, FOUND, average="macro"),
    "f1_weighted": sk.f1_score(GOLD, FOUND, average="weighted"),
    "f1_micro": sk.f1_score(GOLD, FOUND, average="micro"),
    "matthews_correlation": sk.matthews_corrcoef(GOLD, FOUND),
    "exact_match": sk.accuracy_score(GOLD, FOUND),
    "hamming_loss": sk.hamming_loss(GOLD, FOUND),
}
SETS = {
    "accuracy": sk.accuracy_score(GOLD_SETS, FOUND_SETS),
    "precision": sk.precision_score(GOLD_SETS, FOUND_SETS, average="macro"),
    "recall": sk.recall_score(GOLD_SETS, FOUND_SETS, average="macro"),
    "f1": sk.f1_score(GOLD_SETS, FOUND_SETS, average="macro"),
    "f1_weighted": sk.f1_score(GOLD_SETS, FOUND_SETS, average="weighted"),
    "f1_micro": sk.f1_score(GOLD_SETS, FOUND_SETS, average="micro"),
    "exact_match": sk.accuracy_score(GOLD_SETS, FOUND_SETS),
    "hamming_loss": sk.hamming_loss(GOLD_SETS, FOUND_SETS),
}
NUMBERS = {
    "mse": sk.mean_squared_error(TRUTH, GUESS),
    "mae": sk.mean_absolute_error(TRUTH, GUESS),
    "r2": sk.r2_score(TRUTH, GUESS),
    "pearsonr": stats.pearsonr(TRUTH, GUESS).statistic,
    "spearmanr": stats.spearmanr(TRUTH, GUESS).statistic,
}
CASES = [("classes", GOLD, FOUND, CLASSES), ("sets", GOLD_SETS, FOUND_SETS, SETS), ("numbers", TRUTH, GUESS, NUMBERS)]


@pytest.mark.parametrize(
    ("holds", "gold", "found", "name", "expected"),
    [(holds, gold, found, *item) for holds, gold, found, values in CASES for item in values.items()],
)
def test_figures_are_those_of_scikit_learn_and_scipy(holds, gold, found, name, expected):
    assert metrics.compute_metric(name, found, gold, holds) == {name: pytest.approx(expected)}


def test_every_registered_metric_is_among_those_proven_here():
    assert set(metrics.METRICS) == set(CLASSES) | set(SETS) | set(NUMBERS)


def test_an_unknown_name_suggests_the_nearest_without_asking_an_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(evaluate, "load", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(HubError, match="unknown metric 'acuracy': did you mean 'accuracy'"):
        metrics.compute_metric("acuracy", FOUND, GOLD)


def test_other_names_are_asked_of_the_librarys_own_modules_only(monkeypatch):
    asked = []
    module = SimpleNamespace(compute=lambda predictions, references: {"equal": np.mean(predictions == references)})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(evaluate, "load", lambda name, **options: asked.append(name) or module)
    assert metrics.compute_metric("brier_score", FOUND, GOLD) == {"equal": pytest.approx(CLASSES["accuracy"])}
    for name in ("someone/metric", "../metric", "/tmp/metric.py"):
        with pytest.raises(RecipeError, match="unknown metric"):
            metrics.compute_metric(name, FOUND, GOLD)
    assert asked == ["evaluate-metric/brier_score"]


def test_a_hub_that_fails_is_named(monkeypatch):
    def unreachable(*_args, **_options):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(evaluate, "load", unreachable)
    with pytest.raises(HubError, match=r"unknown metric 'f2'.*ConnectionError: no route"):
        metrics.compute_metric("f2", FOUND, GOLD)


def test_a_metric_that_does_not_fit_is_refused_before_training():
    with pytest.raises(RecipeError, match="'mse' scores numbers, not classes; choose from: accuracy"):
        decisions.score(decisions.Classes(GOLD, None, SINGLE.labels), GOLD, ("accuracy", "mse"))
    with pytest.raises(RecipeError, match="calibration_error"):
        decisions.score(decisions.LabelSets(GOLD_SETS, None, MULTI.labels), GOLD_SETS, ("calibration_error",))


def test_decisions_are_torchs_softmax_and_sigmoid():
    import torch

    logits = RANDOM.normal(size=(20, 3)) * 30
    single, multi = head_of(SINGLE).decide(logits), decisions.LabelSets.from_logits(logits, MULTI.labels, 0.7)
    np.testing.assert_allclose(single.probabilities, torch.from_numpy(logits).softmax(1), atol=1e-12)
    np.testing.assert_allclose(multi.probabilities, torch.from_numpy(logits).sigmoid(), atol=1e-12)
    np.testing.assert_array_equal(single.predicted, logits.argmax(1))
    np.testing.assert_array_equal(multi.predicted, (torch.from_numpy(logits).sigmoid() >= 0.7).int())


def test_the_loss_is_weighted_as_in_training():
    outputs = {"logits": np.eye(3), "labels": np.arange(3.0), "loss": [1.0, 2.0, 6.0], "weight": [1.0, 2.0, 1.0]}
    assert decisions.mean_loss(outputs) == 9 / 4


def test_figures_without_rows_are_not_numbers_and_do_not_fail():
    outputs = {"logits": np.zeros((0, 3)), "labels": np.zeros(0), "loss": np.zeros(0), "weight": np.zeros(0)}
    assert np.isnan(list(head_of(SINGLE).metrics(outputs, EvaluationConfig()).values())).all()


def test_constant_predictions_have_no_correlation():
    outputs = {"logits": np.ones((5, 1)), "labels": np.arange(5.0)}
    found = head_of(NUMBER).metrics(outputs, EvaluationConfig())
    assert np.isnan(found["pearsonr"])
    assert found["r2"] == pytest.approx(sk.r2_score(np.arange(5.0), np.ones(5)))


@pytest.mark.parametrize(
    ("name", "greater"),
    [("accuracy", True), ("f1", True), ("r2", True), ("loss", False), ("validation_loss", False), ("mse", False),
     ("eval_calibration_error", False), ("test/hamming_loss", False), ("perplexity", False)],
)  # fmt: skip
def test_direction(name, greater):
    assert greater_is_better(name) is greater
