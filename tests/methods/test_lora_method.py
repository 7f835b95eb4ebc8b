"""LoRA: every field changes what is trained, and what matches nothing is an error that names the nearest."""

from __future__ import annotations

import pytest
import torch

from peftkit.errors import MethodError, RecipeError
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.types import TaskInfo
from tests import tiny

INFO = TaskInfo("single_label_classification", ("a", "b", "c"))


def made(folder, info=INFO, dtype="float32", **method):
    recipe = tiny.tiny_recipe(folder, model={"dtype": dtype}, method=method)
    return build(recipe, info, load_tokenizer(recipe.model))


def adapted(model):
    return sorted(
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in model.named_modules()
        if name.endswith("lora_A.default")
    )


def settings(folder, **method):
    return made(folder, **method).model.peft_config["default"]


@pytest.mark.parametrize(
    ("maker", "in_a_block"),
    [(tiny.tiny_bert, 6), (tiny.tiny_distilbert, 6), (tiny.tiny_roberta, 6), (tiny.tiny_gpt2, 4), (tiny.tiny_llama, 7)],
)
def test_all_linear_takes_every_layer_but_the_head(maker, in_a_block, tmp_path):
    loaded = made(maker(tmp_path))
    names = adapted(loaded.model)
    pooler = [name for name in names if "pooler" in name]
    assert len(names) - len(pooler) == 2 * in_a_block
    assert not any(set(name.split(".")) & set(loaded.head_names) for name in names)
    trained = [name for name, p in loaded.model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert trained
    assert all("modules_to_save" in name and set(name.split(".")) & set(loaded.head_names) for name in trained)


def test_names_patterns_and_whole_names(bert):
    assert adapted(made(bert, target_modules=["query"]).model) == [
        f"bert.encoder.layer.{block}.attention.self.query" for block in (0, 1)
    ]
    whole = "bert.encoder.layer.1.output.dense"
    assert adapted(made(bert, target_modules=[whole]).model) == [whole]
    assert len(adapted(made(bert, target_modules=r".*\.(query|value)").model)) == 4
    assert len(adapted(made(bert, target_modules="key").model)) == 2


def test_a_pattern_that_matches_the_head_leaves_it_alone(tmp_path):
    loaded = made(tiny.tiny_roberta(tmp_path), target_modules=["dense"])
    assert not any("classifier" in name for name in adapted(loaded.model))
    with pytest.raises(MethodError, match="matches no linear module"):
        made(tmp_path, target_modules=["out_proj"])  # only the head has it


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": ["qurey"]}, "did you mean 'query'"),
        ({"target_modules": ["query", "vlaue"]}, "did you mean 'value'"),
        ({"target_modules": ".*q_proj"}, "matches no linear module"),
        ({"target_modules": ["self.qury"]}, "did you mean 'self.query'"),
        ({"exclude_modules": ["querry"]}, "did you mean 'query'"),
        ({"rank_pattern": {"qurey": 2}}, "rank_pattern.*did you mean 'query'"),
        ({"alpha_pattern": {"valu": 2}}, "alpha_pattern.*did you mean 'value'"),
        ({"layers": [5]}, "2 blocks, numbered 0 to 1"),
        ({"layers": -3}, "2 blocks"),
        ({"target_modules": ["query"], "exclude_modules": ["query"]}, "leave no module"),
    ],
)
def test_what_matches_nothing_is_an_error(bert, fields, said):
    with pytest.raises(MethodError, match=said):
        made(bert, **fields)


def test_a_broken_expression_is_found_in_the_recipe():
    with pytest.raises(RecipeError, match=r"target_modules.*not a regular expression"):
        tiny.tiny_recipe("x", method={"target_modules": "(query"})
    with pytest.raises(RecipeError, match="at least one"):
        tiny.tiny_recipe("x", method={"target_modules": []})


def test_exclude_and_layers(bert):
    names = adapted(made(bert, target_modules=["query", "key"], exclude_modules=["key"], layers=-1).model)
    assert names == ["bert.encoder.layer.1.attention.self.query"]
    assert adapted(made(bert, target_modules=["key"], layers=0).model) == ["bert.encoder.layer.0.attention.self.key"]
    assert len(adapted(made(bert, target_modules=["key"], layers=[0, 1]).model)) == 2
    assert len(adapted(made(bert, target_modules=["key"], layers=-2).model)) == 2


def test_rank_alpha_and_scaling(bert):
    def query(**fields):
        model = made(bert, target_modules=["query"], **fields).model
        return model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")

    assert query(rank=4).lora_A["default"].weight.shape == (4, 32)
    assert query(rank=4).scaling["default"] == 2.0  # alpha is twice the rank
    assert query(rank=4, alpha=4).scaling["default"] == 1.0
    assert query(rank=4, alpha=4, use_rslora=True).scaling["default"] == 2.0
    assert query(dropout=0.3).lora_dropout["default"].p == 0.3
    assert query(use_dora=True).use_dora["default"]
    other = query(rank=4, rank_pattern={"query": 2}, alpha_pattern={"query": 6})
    assert other.lora_A["default"].weight.shape == (2, 32)
    assert other.scaling["default"] == 3.0


def test_bias(bert):
    def biases(kind):
        model = made(bert, target_modules=["query"], bias=kind).model
        names = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
        return [name for name in names if "modules_to_save" not in name]

    assert biases("none") == []
    assert len(biases("lora_only")) == 2
    assert len(biases("all")) > 2


def test_starts(bert):
    def start(kind):
        model = made(bert, target_modules=["query"], init_lora_weights=kind).model
        layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
        return layer, layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()

    plain, first, zero = start("default")
    assert not zero.any()
    _, other, zero = start("gaussian")
    assert not zero.any()
    assert not torch.equal(first, other)
    for kind in ("pissa", "olora"):
        layer, a, b = start(kind)
        assert b.any()
        whole = layer.base_layer.weight + layer.scaling["default"] * (b @ a)
        torch.testing.assert_close(whole, plain.base_layer.weight, rtol=1e-4, atol=1e-5)
    _, a, b = start("orthogonal")
    assert b.any()
    assert (b @ a).abs().max() < 1e-6  # B lives where A does not


def test_orthogonal_start_halves_the_rank():
    with pytest.raises(RecipeError, match="even rank"):
        tiny.tiny_recipe("x", method={"rank": 3, "init_lora_weights": "orthogonal"})


def test_language_model_keeps_its_output_embeddings(llama):
    loaded = made(llama, TaskInfo("causal_lm"))
    assert not any("lm_head" in name for name in adapted(loaded.model))
    assert loaded.model.peft_config["default"].task_type == "CAUSAL_LM"
    assert settings(llama).task_type == "SEQ_CLS"


def test_seed_decides_the_start(bert):
    def weight(seed):
        recipe = tiny.tiny_recipe(bert, training={"seed": seed}, method={"target_modules": ["query"]})
        model = build(recipe, INFO, load_tokenizer(recipe.model)).model
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(weight(3), weight(3))
    assert not torch.equal(weight(3), weight(4))
