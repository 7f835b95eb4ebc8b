"""A head that starts at the class means: scikit-learn's nearest centroid, its temperature the best left-out one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

import peftkit
from peftkit.data.pipeline import encode, prepare
from peftkit.errors import RecipeError
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.recipe import Recipe, replace
from peftkit.tasks._head_start import at_class_means, nearest_mean
from tests import tiny


def clusters(rows=90, classes=3, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, width, generator=generator)
    return centres[labels] + torch.randn(rows, width, generator=generator), labels


def test_it_decides_as_scikit_learn_s_nearest_centroid():
    inputs, labels = clusters()
    others, _ = clusters(200, seed=1)
    weight, bias = nearest_mean(inputs, labels, 3)
    expected = NearestCentroid().fit(inputs.double().numpy(), labels.numpy()).predict(others.double().numpy())
    assert np.array_equal((others.double() @ weight.T + bias).argmax(1).numpy(), expected)


def test_no_other_temperature_has_less_loss_on_rows_left_out():
    inputs, labels = clusters()

    def left_out(factor):
        losses = []
        for row in range(len(labels)):
            rest = torch.arange(len(labels)) != row
            means = torch.stack([inputs[rest & (labels == c)].double().mean(0) for c in range(3)])
            logits = (inputs[row].double() @ means.T - (means**2).sum(1) / 2) / factor
            losses.append(torch.nn.functional.cross_entropy(logits[None], labels[row, None]))
        return float(torch.stack(losses).mean())

    weight, _ = nearest_mean(inputs, labels, 3)
    means = torch.stack([inputs[labels == c].double().mean(0) for c in range(3)])
    chosen = float((means - means.mean(0)).norm() / weight.norm())
    assert left_out(chosen) < min(left_out(chosen / 1.6), left_out(chosen * 1.6))


def test_a_class_without_rows_pulls_nowhere_and_single_rows_are_no_trouble():
    inputs, labels = clusters(3)
    weight, bias = nearest_mean(inputs, labels, 5)
    assert torch.isfinite(torch.cat([weight, bias[:, None]], 1)).all()
    assert (weight[3:] == 0).all()
    assert (inputs.double() @ weight.T + bias)[:, :3].argmax(1).tolist() == labels.tolist()


@pytest.mark.parametrize(("method", "pooling"), [("frozen", "own"), ("lora", "mean"), ("full", "own")])
def test_a_run_starts_where_its_classes_are(small_recipe, method, pooling):
    hardly = {"max_steps": 1, "learning_rate": 1e-9}
    changes = {"method": {"kind": method}, "model": {"pooling": pooling}, "training": hardly}
    run = peftkit.train(replace(small_recipe, task={"head_start": "class_means"}, **changes), quiet=True)
    assert run.metrics["test"]["accuracy"] > 0.6  # a third by chance
    assert run.predict("the stock market oil price money bank")[0].label == "business"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"label": 1.5}, "task.head_start needs classes"),
        ({"label": ["a"]}, "task.head_start works where a row has one"),
    ],
)
def test_rows_without_one_class_are_refused_before_a_model_is_looked_for(tmp_path, row, said):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"t {n}", **row}) + "\n" for n in range(20)))
    recipe = Recipe.parse(
        {"name": "r", "model": {"source": "nowhere"}, "data": {"source": str(tmp_path / "rows.jsonl")},
         "task": {"kind": "classification", "head_start": "class_means"}}
    )  # fmt: skip
    with pytest.raises(RecipeError, match=said):
        prepare(recipe)


def test_heads_without_a_bias_are_refused(small_recipe, llama):
    recipe = replace(small_recipe, model={"source": str(llama)}, task={"head_start": "class_means"})
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
        at_class_means(loaded, [split.batch(rows, tokenizer) for rows in numbers], prepared.info)
        heads.append({name: value for name, value in loaded.model.named_parameters() if "classifier" in name})
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value, rtol=1e-3, atol=1e-5)


def test_heads_of_several_layers_are_set_in_their_last(small_recipe, tmp_path):
    roberta = tiny.tiny_roberta(tmp_path / "roberta")
    rates = {"max_steps": 1, "learning_rate": 1e-9}
    recipe = replace(small_recipe, model={"source": str(roberta)}, task={"head_start": "class_means"}, training=rates)
    assert peftkit.train(recipe, quiet=True).metrics["test"]["accuracy"] > 0.4
