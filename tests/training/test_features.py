"""Features kept on disk: the same head and figures as without them, computed once, and only where that is allowed."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import peftkit
from peftkit import replace
from peftkit.schema.head import head_of
from peftkit.system.cache import cache_folder
from peftkit.training import feature_store, features
from peftkit.training.frozen_trunk import FEATURES, FrozenTrunk
from tests import tiny

FROZEN = {"method": {"kind": "frozen"}}
METHODS = {
    "frozen": {"kind": "frozen"},
    "lora on the last block": {"kind": "lora", "rank": 4, "layers": -1},
    "top block": {"kind": "top_k", "k": 1},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(small_recipe):
    """Dropout everywhere, so that dropout in the trunk would be seen."""
    return replace(small_recipe, model={"dropout": 0.2}, training={"epochs": 2})


@pytest.fixture
def captured(monkeypatch):
    """How often a batch was run up to the cut point."""
    seen, real = [], FrozenTrunk.capture
    monkeypatch.setattr(FrozenTrunk, "capture", lambda self, *given: (seen.append(1), real(self, *given))[1])
    return seen


def weights(run):
    return load_file(next(run.adapter.glob("*.safetensors")))


def notes(run):
    return " ".join(json.loads((run.path / "about.json").read_text())["notes"])


def entries():
    return [path for path in cache_folder("features").iterdir() if path.is_dir()]


@pytest.mark.parametrize("method", [
    pytest.param(method, id=name, marks=pytest.mark.slow if name == "top block" else ())
    for name, method in METHODS.items()
])  # fmt: skip
def test_the_same_weights_and_figures_as_without_the_cache(recipe, method):
    recipe = replace(recipe, method=method)
    with_cache = peftkit.train(recipe)
    without = peftkit.train(replace(recipe, training={"feature_cache_gb": 0}))
    assert "computed once and cached" in notes(with_cache)
    assert "the cache is off" in notes(without)
    ours, plain = weights(with_cache), weights(without)
    assert ours.keys() == plain.keys()
    for name, tensor in plain.items():
        if name.endswith("key.bias"):
            continue  # softmax does not see it: its gradient is rounding, and Adam makes steps of it
        torch.testing.assert_close(ours[name], tensor, rtol=2e-3, atol=2e-4)
    for name, value in without.metrics["test"].items():
        assert with_cache.metrics["test"][name] == pytest.approx(value, abs=1e-4), name


def test_bit_for_bit_where_the_batches_are_the_same(bert, topics_csv):
    """One pass over all rows, in the batches in which they are trained: not one bit differs."""
    from peftkit.data.pipeline import encode, prepare
    from peftkit.distributed.session import open_session
    from peftkit.models.loading import build
    from peftkit.models.tokenizer import load_tokenizer
    from peftkit.training.step import TaskModule

    recipe = tiny.tiny_recipe(bert, method={"kind": "lora", "layers": -1}, data={"source": str(topics_csv)})
    tokenizer, prepared = load_tokenizer(recipe.model), prepare(recipe)
    encoded = encode(prepared, tokenizer, recipe)
    module = TaskModule(build(recipe, prepared.info, tokenizer), head_of(prepared.info, recipe.task))
    plan = features.plan_features(module, recipe, encoded, tokenizer, open_session(recipe), "base")
    rows, split = np.arange(8), plan.run().splits["train"]
    batch = split.batch(rows, tokenizer)
    plain = encoded.splits["train"].batch(rows, tokenizer)
    hidden, mask = plan._capture(encoded.splits["train"], rows)
    batch[FEATURES] = hidden * mask[:, :, None]
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(batch, outputs=True)["logits"], module(plain, outputs=True)["logits"])
    stored = split.batch(rows, tokenizer)[FEATURES]
    torch.testing.assert_close(stored, batch[FEATURES], rtol=1e-4, atol=1e-4)


def test_a_second_run_and_a_sweep_over_the_head_compute_nothing(recipe, captured):
    recipe = replace(recipe, **FROZEN)
    first = peftkit.train(recipe)
    made, found = len(captured), entries()
    captured.clear()
    again = peftkit.train(recipe)
    sweep = {"training": {"learning_rate": 0.03, "seed": 5}, "task": {"label_smoothing": 0.1}, "model": {"dropout": 0}}
    swept = peftkit.train(replace(recipe, **sweep))
    assert entries() == found
    assert weights(first)["base_model.model.classifier.weight"].equal(
        weights(again)["base_model.model.classifier.weight"]
    )
    assert not weights(first)["base_model.model.classifier.weight"].equal(
        weights(swept)["base_model.model.classifier.weight"]
    )
    assert len(captured) // 2 < made  # a few rows a run, to see that they still agree
    assert "are read from" in notes(again)


def test_whatever_features_depend_on_makes_others(recipe):
    recipe = replace(recipe, **FROZEN)
    peftkit.train(recipe)
    for change in (
        {"model": {"dtype": "bfloat16"}},
        {"data": {"max_length": 9}},
        {"model": {"pooling": "mean"}},
        {"method": {"kind": "lora", "layers": -1}},
    ):
        before = len(entries())
        peftkit.train(replace(recipe, **change))
        assert len(entries()) == before + 3, change


def test_another_base_in_the_same_folder_is_noticed(recipe, tmp_path):
    folder = tiny.tiny_bert(tmp_path / "base")
    recipe = replace(recipe, model={"source": str(folder), "dropout": 0.2}, **FROZEN)
    peftkit.train(recipe)
    tiny.tiny_bert(tmp_path / "base", initializer_range=0.3)
    peftkit.train(recipe)
    assert len(entries()) == 6


def test_stored_features_that_do_not_agree_or_are_damaged_are_computed_again(recipe, captured):
    recipe = replace(recipe, **FROZEN)
    first = peftkit.train(recipe)
    for path in entries():
        stored = np.load(path / "features.npy")
        with feature_store_write(path) as file:
            np.save(file, stored + 1)
    swapped = peftkit.train(recipe)
    assert weights(first)["base_model.model.classifier.weight"].equal(
        weights(swapped)["base_model.model.classifier.weight"]
    )


def feature_store_write(path):
    """Writes an entry anew, sealed as if it were right."""
    from contextlib import contextmanager

    from peftkit.system.cache import seal

    @contextmanager
    def writing():
        with (path / "features.npy").open("wb") as file:
            yield file
        seal(path)

    return writing()


def test_the_size_is_told_and_the_limit_kept(recipe):
    recipe = replace(recipe, **FROZEN)
    over = peftkit.train(replace(recipe, training={"feature_cache_gb": 1e-6}))
    assert "training.feature_cache_gb allows 1e-06" in notes(over)
    assert entries() == []
    within = peftkit.train(recipe)
    rows, size = 90, sum((path / "features.npy").stat().st_size for path in entries())
    assert rows * 32 * 4 <= size < rows * 32 * 4 + 1000
    assert f"({rows * 32 * 4 / 1e6:.1f} MB)" in notes(within)


def test_what_was_used_longest_ago_makes_room():
    for age, name in enumerate(("new", "old", "kept")):
        folder = cache_folder("features") / name
        folder.mkdir()
        (folder / "features.npy").write_bytes(b"0" * 400)
        os.utime(folder, (1e9 - age, 1e9 - age))
    feature_store.make_room(400, 1300 / feature_store.GB, keep={cache_folder("features") / "kept"})
    assert sorted(path.name for path in entries()) == ["kept", "new"]


@pytest.mark.slow
def test_noise_below_or_too_short_a_training_keeps_nothing(recipe):
    recipe = replace(recipe, **FROZEN)
    noisy = peftkit.train(replace(recipe, training={"neftune_alpha": 5.0}))
    assert "run without dropout" not in notes(noisy)
    short = peftkit.train(replace(recipe, training={"max_steps": 2}))
    assert "before it has seen every row once" in notes(short)
    assert entries() == []
    assert "features are not cached" not in notes(peftkit.train(replace(recipe, method={"kind": "lora"})))


def test_digests_follow_inputs_and_not_labels():
    from datasets import Dataset

    def digest(**columns):
        held = {"input_ids": [[1, 2], [3]], "labels": [0, 1], **columns}
        return feature_store.inputs_digest(
            SimpleNamespace(examples=Dataset.from_dict(held), lengths=np.array([2, 1], dtype=np.int32))
        )

    assert digest() == digest(labels=[1, 1])
    assert digest() != digest(input_ids=[[1, 3], [3]])
    assert digest() != digest(token_type_ids=[[0, 1], [0]])
    assert digest(token_type_ids=[[0, 0], [0]]) != digest(position_ids=[[0, 0], [0]])
