"""Every field of ``training`` changes what it says it changes."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

import peftkit
from peftkit import replace
from peftkit.errors import Interrupted
from peftkit.runs import checkpoints


@pytest.fixture
def quick(small_recipe):
    """Eight steps, no baselines."""
    return replace(small_recipe, training={"epochs": 1}, evaluation={"baselines": []})


def adapter(run):
    return (run.path / "adapter" / "adapter_model.safetensors").read_bytes()


def weights(run):
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def lines(run, kind):
    log = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    wanted = {"train": "learning_rate", "validation": "split", "event": "event"}[kind]
    return [line for line in log if wanted in line]


LEARNS_DIFFERENTLY = {
    "epochs": {"epochs": 2},
    "max_steps": {"max_steps": 3},
    "batch_size": {"batch_size": 16},
    "batch_tokens": {"batch_tokens": 200},
    "batching": {"batching": "random"},
    "learning_rate": {"learning_rate": 2e-3},
    "optimizer": {"optimizer": "sgd"},
    "optimizer: adafactor": {"optimizer": "adafactor"},
    "optimizer: adamw_8bit": {"optimizer": "adamw_8bit"},
    "betas": {"betas": (0.8, 0.9)},
    "eps": {"eps": 1e-2},
    "weight_decay": {"weight_decay": 0.5},
    "max_grad_norm": {"max_grad_norm": 0.01},
    "max_grad_norm: none": {"max_grad_norm": None},
    "scheduler": {"scheduler": "cosine"},
    "warmup: share": {"warmup": 0.5},
    "warmup: steps": {"warmup": 3},
    "neftune_alpha": {"neftune_alpha": 5.0},
    "weight_averaging": {"weight_averaging": 0.9},
    "seed": {"seed": 1},
}


def test_every_field_of_learning_changes_the_trained_weights(quick):
    quick = replace(quick, data={"limit": {"train": 40, "validation": 4, "test": 4}})  # five steps
    plain = adapter(peftkit.train(quick, quiet=True))
    same = []
    for name, change in LEARNS_DIFFERENTLY.items():
        if adapter(peftkit.train(replace(quick, training=change), quiet=True)) == plain:
            same.append(name)
    assert same == []


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd", "adafactor"])
def test_every_optimizer_resumes_to_the_same_bytes(quick, monkeypatch, name):
    from peftkit.training.interruptions import StopRequest

    recipe = replace(quick, training={"optimizer": name})
    whole = peftkit.train(recipe, quiet=True)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "code", property(lambda self: 15 if (asked.append(1), len(asked) == 5)[1] else 0))
        with pytest.raises(Interrupted) as stopped:
            peftkit.train(recipe, quiet=True)
    assert stopped.value.exit_code == 143
    assert adapter(peftkit.train(recipe, resume=True, quiet=True)) == adapter(whole)


def test_max_steps_and_fractions_of_epochs_end_where_they_say(quick):
    assert peftkit.train(replace(quick, training={"max_steps": 3}), quiet=True).metrics["training"]["steps"] == 3
    assert peftkit.train(replace(quick, training={"epochs": 1.5}), quiet=True).metrics["training"]["steps"] == 12


def test_max_time_stops_with_a_checkpoint_to_go_on_from(quick):
    with pytest.raises(Interrupted, match="the time limit after step 1 of 8") as stopped:
        peftkit.train(replace(quick, training={"max_time": 1e-6}), quiet=True)
    assert stopped.value.exit_code == 143
    assert peftkit.train(quick, resume=True, quiet=True).metrics["training"]["steps"] == 8


def test_log_every_evaluate_every_save_every_and_keep_checkpoints_are_counts(quick, monkeypatch):
    saved, real = [], checkpoints.save
    monkeypatch.setattr(
        checkpoints, "save", lambda root, step, **rest: (saved.append(step), real(root, step, **rest))[1]
    )
    training = {"log_every": 2, "evaluate_every": 8, "save_every": 2, "keep_checkpoints": 3}
    run = peftkit.train(replace(quick, training=training), quiet=True)
    assert [line["step"] for line in lines(run, "train")] == [2, 4, 6, 8]
    assert [line["step"] for line in lines(run, "validation")] == [8]
    assert sorted(set(saved)) == [2, 4, 6, 8]
    assert sorted(os.listdir(run.path / "checkpoints")) == ["step-00000004", "step-00000006", "step-00000008"]
    often = peftkit.train(replace(quick, training={"evaluate_every": 3}), quiet=True)
    assert [line["step"] for line in lines(often, "validation")] == [3, 6, 8]


def test_early_stopping_waits_for_patience_and_ignores_small_gains(quick):
    base = {"epochs": 8, "evaluate_every": 2, "best_metric": "loss"}
    patient = replace(quick, training={**base, "early_stopping": {"patience": 2, "min_delta": 10.0}})
    run = peftkit.train(patient, quiet=True)
    assert run.metrics["training"]["steps"] == 6  # the first validation, and two that gain less than 10
    assert run.metrics["training"]["stopped_early"]
    longer = replace(quick, training={**base, "early_stopping": {"patience": 3, "min_delta": 10.0}})
    assert peftkit.train(longer, quiet=True).metrics["training"]["steps"] == 8
    small_gains = replace(quick, training={**base, "early_stopping": {"patience": 2, "min_delta": 0.0}})
    assert peftkit.train(small_gains, quiet=True).metrics["training"]["steps"] > 6


def test_best_metric_decides_which_checkpoint_is_restored(quick):
    for metric in ("loss", "f1"):
        run = peftkit.train(replace(quick, training={"best_metric": metric}), quiet=True)
        assert run.metrics["training"]["best_metric"] == metric
        assert run.metrics["validation"][metric] == pytest.approx(run.metrics["training"]["best_value"], rel=1e-5)


def test_gradient_checkpointing_runs_layers_twice_and_learns_the_same(quick, monkeypatch):
    from transformers.models.bert.modeling_bert import BertIntermediate

    calls, real = [], BertIntermediate.forward
    monkeypatch.setattr(BertIntermediate, "forward", lambda self, *a, **k: (calls.append(1), real(self, *a, **k))[1])
    once = peftkit.train(quick, quiet=True)
    plain = len(calls)
    for mode in (True, "selective"):
        calls.clear()
        again = peftkit.train(replace(quick, training={"gradient_checkpointing": mode}), quiet=True)
        assert len(calls) >= plain + 8  # 8 steps; of 2 layers at least one is run again
        for name, weight in weights(once).items():  # bytes differ with torch 2.11
            torch.testing.assert_close(weights(again)[name], weight, rtol=1e-5, atol=1e-7)


def test_threads_are_set(quick):
    before = torch.get_num_threads()
    try:
        peftkit.train(replace(quick, training={"threads": 2, "max_steps": 1}), quiet=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_tracking_and_output_dir_and_name(quick, tmp_path):
    recipe = replace(quick, name="tracked", tracking=["tensorboard"], output_dir=str(tmp_path / "there"))
    run = peftkit.train(recipe, quiet=True)
    assert run.path.parent == tmp_path / "there"
    assert run.path.name.startswith("tracked-")
    assert list(run.path.rglob("events.out.tfevents*"))


def test_evaluation_fields_shape_the_result(quick):
    recipe = replace(quick, evaluation={"metrics": ["accuracy", "balanced_accuracy"], "baselines": ["majority"],
                                        "worst": 1, "confidence": 0.5, "batch_size": 3})  # fmt: skip
    run = peftkit.train(recipe, quiet=True)
    assert set(run.metrics["test"]) == {"loss", "accuracy", "balanced_accuracy"}
    assert "majority" in run.metrics
    assert "zero_shot" not in run.metrics
    assessment = json.loads((run.path / "assessment.json").read_text())["test"]
    assert assessment["confidence"] == 0.5
    assert len(assessment["mistakes"]) <= 1
