"""Whole runs on tiny models: from a recipe to an adapter; stopped anywhere and resumed to the same bytes."""

from __future__ import annotations

import json
import random
import signal

import pytest

import peftkit
from peftkit import replace
from peftkit.errors import Interrupted, RecipeError, RunError, TrainingError
from peftkit.training.interruptions import StopRequest


def adapter_bytes(run):
    return (run.path / "adapter" / "adapter_model.safetensors").read_bytes()


def stop_after(monkeypatch, checks, number=signal.SIGINT):
    """The stop request comes true at the given asking, in a step or in the middle of a validation."""
    asked = {"times": 0}

    def code(self):
        asked["times"] += 1
        return int(number) if asked["times"] >= checks else 0

    monkeypatch.setattr(StopRequest, "code", property(code))


def log_without_times(run):
    timed = {"rows_per_second", "tokens_per_second"}
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def test_a_run_learns_and_leaves_everything_behind(small_recipe, drawn_plots):
    run = peftkit.train(small_recipe)
    for name in ("recipe.yaml", "info.json", "environment.json", "metrics.json", "metrics.jsonl", "report.html",
                 "adapter/adapter_config.json", "adapter/README.md", "predictions/test.jsonl",
                 "plots/learning_curves.png", "plots/confusion_matrix.png"):  # fmt: skip
        assert (run.path / name).is_file(), name
    assert run.metrics["test"]["accuracy"] > run.metrics["majority"]["accuracy"] + 0.2
    losses = [line["loss"] for line in log_without_times(run) if "learning_rate" in line]
    assert losses[-1] < losses[0] / 2
    assert peftkit.Recipe.from_yaml(run.path / "recipe.yaml") == small_recipe
    lines = [json.loads(line) for line in (run.path / "predictions" / "test.jsonl").read_text().splitlines()]
    again = run.predict([line["text"] for line in lines])
    assert [prediction.label for prediction in again] == [line["predicted"] for line in lines]


def test_every_epoch_has_an_order_of_its_own(small_recipe, monkeypatch):
    from peftkit.training.step import Stepper

    seen, real = [], Stepper.run
    monkeypatch.setattr(
        Stepper, "run", lambda self, batch, step: (seen.append(batch.tolist()), real(self, batch, step))[1]
    )
    peftkit.train(replace(small_recipe, training={"epochs": 2}))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert sorted(row for batch in first for row in batch) == sorted(row for batch in second for row in batch)
    assert first != second


def test_two_runs_of_one_recipe_are_the_same_to_the_last_bit(small_recipe):
    first, second = peftkit.train(small_recipe), peftkit.train(small_recipe)
    assert adapter_bytes(first) == adapter_bytes(second)
    assert first.path != second.path


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_anywhere_and_resumed_equals_uninterrupted(small_recipe, monkeypatch, seed):
    recipe = replace(
        small_recipe,
        training={"micro_batch": 3, "evaluate_every": 4, "save_every": 5, "early_stopping": {"patience": 3}},
    )
    whole = peftkit.train(recipe)
    generator = random.Random(seed)
    for checks in generator.sample(range(1, 30), 3):
        with monkeypatch.context() as patch:
            stop_after(patch, checks)
            with pytest.raises(Interrupted, match="peftkit train --resume") as stopped:
                peftkit.train(recipe)
        assert stopped.value.exit_code == 130
        resumed = peftkit.train(recipe, resume=True)
        assert adapter_bytes(resumed) == adapter_bytes(whole), f"stopped at asking {checks}"
        assert log_without_times(resumed) == log_without_times(whole)
        assert resumed.metrics["test"] == whole.metrics["test"]


def test_accumulated_equals_one_batch(small_recipe):
    one = peftkit.train(replace(small_recipe, model={"dropout": 0.0}, method={"dropout": 0.0}))
    many = peftkit.train(
        replace(small_recipe, model={"dropout": 0.0}, method={"dropout": 0.0}, training={"micro_batch": 3})
    )
    pairs = zip(log_without_times(one), log_without_times(many), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in pairs)


def test_a_changed_recipe_or_data_set_is_refused_by_name_unless_allowed(
    small_recipe, monkeypatch, topics_csv, tmp_path
):
    copy = tmp_path / "copy.csv"
    copy.write_bytes(topics_csv.read_bytes())
    recipe = replace(small_recipe, data={"source": str(copy)})
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            peftkit.train(recipe)
    with pytest.raises(RunError, match=r"training.learning_rate \(0.01 → 0.001\)"):
        peftkit.train(replace(recipe, training={"learning_rate": 1e-3}), resume=True)
    copy.write_text(copy.read_text() + "one more game of the team,sports\n")
    with pytest.raises(RunError, match="these changed: data"):
        peftkit.train(recipe, resume=True)
    allowed = peftkit.train(recipe, resume=True, allow=("data",))
    assert allowed.metrics["test"]["accuracy"] > 0.4


def test_a_wrong_metric_name_is_an_error_before_the_first_step(small_recipe):
    with pytest.raises(RecipeError, match="did you mean 'accuracy'"):
        peftkit.train(replace(small_recipe, training={"best_metric": "acuracy"}))


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_rows(small_recipe, monkeypatch):
    from peftkit.heads.classifier import Classifier

    real, calls = Classifier.loss, {"n": 0}

    def broken(self, *args):
        calls["n"] += 1
        return real(self, *args) * (float("nan") if calls["n"] == 5 else 1.0)

    monkeypatch.setattr(Classifier, "loss", broken)
    with pytest.raises(TrainingError, match=r"step 5, training rows \d+ \(\S+topics.csv:\d+\), \d+ \("):
        peftkit.train(small_recipe)
    calls["n"] = 0
    run = peftkit.train(replace(small_recipe, training={"nonfinite": "skip"}))
    assert run.metrics["training"]["skipped_steps"] == 1


def test_the_best_weights_are_restored_at_the_end(small_recipe):
    recipe = replace(small_recipe, training={"learning_rate": 0.5, "scheduler": "constant", "warmup": 0, "epochs": 4})
    run = peftkit.train(recipe)
    seen = [line["loss"] for line in log_without_times(run) if line.get("split") == "validation"]
    metric = run.metrics["training"]["best_metric"]
    values = [line[metric] for line in log_without_times(run) if line.get("split") == "validation"]
    best = (min if metric == "loss" else max)(values)
    assert run.metrics["validation"][metric] == pytest.approx(best, rel=1e-5)
    assert len(seen) == 4


def test_a_second_process_in_the_same_folder_is_refused(small_recipe):
    from filelock import FileLock

    run = peftkit.train(small_recipe)
    with FileLock(run.path / ".lock"), pytest.raises(RunError, match="another process"):
        peftkit.train(small_recipe, resume=run.path)
