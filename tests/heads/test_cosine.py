"""A head of cosines: scikit-learn's centroids at the start, scikit-learn's cosines in training, linear afterwards."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

import peftkit
from peftkit.data.pipeline import encode, prepare
from peftkit.errors import Interrupted, RecipeError
from peftkit.heads.layers.cosine import _head, _inputs, class_directions, start
from peftkit.models.loading import build
from peftkit.models.pooled_logits import logits
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.recipe import Recipe, replace
from tests import tiny


def test_class_directions_decide_as_scikit_learn_s_nearest_centroid_of_unit_vectors():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    centres = torch.randn(3, 8, generator=generator)
    inputs = centres[labels] + torch.randn(90, 8, generator=generator)
    found = class_directions(inputs, labels, 3)
    means = NearestCentroid().fit(normalize(inputs.double().numpy()), labels.numpy()).centroids_
    np.testing.assert_allclose(found.numpy(), normalize(means), rtol=1e-6)
    assert (class_directions(inputs, labels, 5)[3:] == 0).all()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_in_training_the_scores_are_cosines_and_in_evaluation_the_head_is_plain(small_recipe, temperature):
    recipe = replace(small_recipe, model={"pooling": "mean"}, method={"dropout": 0.0})
    tokenizer, prepared = load_tokenizer(recipe.model), prepare(recipe)
    split = encode(prepared, tokenizer, recipe).splits["train"]
    loaded = build(recipe, prepared.info, tokenizer)
    batch = split.batch(np.arange(12), tokenizer)
    start(loaded, [split.batch(np.arange(len(split.lengths)), tokenizer)], prepared.info, temperature)
    head = _head(loaded, 3)
    (inputs, _) = _inputs(head, loaded, [batch])
    cosines = cosine_similarity(inputs.detach().numpy(), head.weight.detach().numpy())
    with torch.no_grad():
        for module in loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        scores = logits(loaded.model.train(), batch, "mean")
        np.testing.assert_allclose(scores.numpy(), cosines / temperature, rtol=1e-3, atol=1e-3)
        plain = logits(loaded.model.eval(), batch, "mean")
        torch.testing.assert_close(plain, inputs @ head.weight.T + head.bias)
    assert (plain.argmax(1) == scores.argmax(1)).all()


@pytest.mark.parametrize(("method", "pooling"), [("frozen", "own"), ("lora", "mean"), ("full", "own")])
def test_a_run_starts_where_its_classes_are(small_recipe, method, pooling):
    hardly = {"max_steps": 1, "learning_rate": 1e-9}
    changes = {"method": {"kind": method}, "model": {"pooling": pooling}, "training": hardly}
    run = peftkit.train(replace(small_recipe, task={"cosine_temperature": 0.1}, **changes), quiet=True)
    assert run.metrics["test"]["accuracy"] > 0.6  # a third by chance


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (lambda n: n / 8, "task.cosine_temperature needs classes"),
        (lambda n: ["a"], "task.cosine_temperature works where a row has one"),
    ],
    ids=["number", "list"],
)
def test_rows_without_one_class_are_refused_before_a_model_is_looked_for(tmp_path, label, said):
    rows = [{"text": f"t {n}", "label": label(n)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.parse(
        {"name": "r", "model": {"source": "nowhere"}, "data": {"source": str(tmp_path / "rows.jsonl")},
         "task": {"kind": "classification", "cosine_temperature": 0.1}}
    )  # fmt: skip
    with pytest.raises(RecipeError, match=said):
        prepare(recipe)


def test_heads_without_a_bias_are_refused(small_recipe, llama):
    recipe = replace(small_recipe, model={"source": str(llama)}, task={"cosine_temperature": 0.1})
    with pytest.raises(RecipeError, match="linear layer with a bias over one vector a row, which Llama"):
        peftkit.train(recipe, quiet=True)


def test_rows_seen_in_other_batches_give_the_same_head(small_recipe):
    """What a resumed run computes anew, and what the planner's passes have no part in."""
    tokenizer, prepared = load_tokenizer(small_recipe.model), prepare(small_recipe)
    split = encode(prepared, tokenizer, small_recipe).splits["train"]
    heads = []
    for size in (len(split.lengths), 7):
        loaded = build(small_recipe, prepared.info, tokenizer)
        numbers = np.array_split(np.arange(len(split.lengths)), -(-len(split.lengths) // size))
        start(loaded, [split.batch(rows, tokenizer) for rows in numbers], prepared.info, 0.1)
        heads.append({name: value for name, value in loaded.model.named_parameters() if "classifier" in name})
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value, rtol=1e-3, atol=1e-5)


def test_heads_of_several_layers_are_set_in_their_last(small_recipe, tmp_path):
    roberta = tiny.tiny_roberta(tmp_path / "roberta")
    rates = {"max_steps": 1, "learning_rate": 1e-9}
    recipe = replace(small_recipe, model={"source": str(roberta)}, task={"cosine_temperature": 0.1}, training=rates)
    assert peftkit.train(recipe, quiet=True).metrics["test"]["accuracy"] > 0.4


@pytest.mark.slow
def test_a_resumed_run_learns_the_same(small_recipe):
    changes = {"epochs": 2, "evaluate_every": 3, "save_every": 3}
    recipe = replace(small_recipe, task={"cosine_temperature": 0.1}, training=changes)
    whole = peftkit.train(recipe, quiet=True)

    def stop(step, _):
        if step == 6:
            raise Interrupted("enough", 15)

    with pytest.raises(Interrupted):
        peftkit.train(recipe, quiet=True, on_validation=stop)
    resumed = peftkit.train(recipe, resume=True, quiet=True)
    first, second = (load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
