"""Which weights the other methods train, on every architecture."""

from __future__ import annotations

import pytest

from peftkit.errors import MethodError, RecipeError
from peftkit.models.blocks import find_blocks
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.registries import METHODS
from peftkit.schema.types import TaskInfo
from tests import tiny

INFO = TaskInfo("single_label_classification", ("a", "b", "c"))
MAKERS = [tiny.tiny_bert, tiny.tiny_distilbert, tiny.tiny_roberta, tiny.tiny_gpt2, tiny.tiny_llama]


def made(folder, info=INFO, **method):
    recipe = tiny.tiny_recipe(folder, method=method)
    return build(recipe, info, load_tokenizer(recipe.model))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("maker", MAKERS)
def test_frozen_trains_the_head_only(maker, tmp_path):
    loaded = made(maker(tmp_path), kind="frozen")
    names = trained(loaded.model)
    assert names
    assert all("modules_to_save.default" in name and set(name.split(".")) & set(loaded.head_names) for name in names)
    assert not any("lora_" in name for name, _ in loaded.model.named_parameters())


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("k", [1, 2])
def test_top_k_trains_the_last_blocks_and_what_is_above(maker, k, tmp_path):
    loaded = made(maker(tmp_path), kind="top_k", k=k)
    prefix, blocks = find_blocks(loaded.model)
    assert len(blocks) == 2
    for number in range(2):
        states = {p.requires_grad for p in blocks[number].parameters()}
        assert states == {number >= 2 - k}
    names = trained(loaded.model)
    assert all(any(head in name.split(".") for name in names) for head in loaded.head_names)
    outside = {name for name in names if not name.startswith(f"{prefix}.")}
    assert not any("embed" in name or "wte" in name or "wpe" in name for name in outside)


def test_top_k_includes_final_norm_and_pooler(tmp_path):
    assert any("ln_f" in name for name in trained(made(tiny.tiny_gpt2(tmp_path / "g"), kind="top_k", k=1).model))
    assert any("pooler" in name for name in trained(made(tiny.tiny_bert(tmp_path / "b"), kind="top_k", k=1).model))


def test_top_k_leaves_tied_output_embeddings(llama):
    loaded = made(llama, TaskInfo("causal_lm"), kind="top_k", k=1)
    assert not loaded.model.get_output_embeddings().weight.requires_grad
    assert loaded.model.get_submodule("model.norm").weight.requires_grad


def test_more_blocks_than_there_are(bert):
    with pytest.raises(MethodError, match="2 blocks"):
        made(bert, kind="top_k", k=3)


def test_full_trains_everything(bert):
    model = made(bert, kind="full").model
    assert len(trained(model)) == len(list(model.parameters()))


def test_frozen_needs_a_head_of_its_own():
    with pytest.raises((MethodError, RecipeError), match="classifier's head"):
        tiny.tiny_recipe("x", method={"kind": "frozen"}, task={"kind": "style"})


def test_learning_rates_and_what_is_saved():
    rates = {name: METHODS.get(name).default_learning_rate for name in ("lora", "frozen", "top_k", "full")}
    assert rates["full"] < rates["top_k"] < rates["lora"] < rates["frozen"]
    assert [METHODS.get(name).saves for name in ("lora", "frozen", "top_k", "full")] == [
        "adapter", "adapter", "model", "model",
    ]  # fmt: skip
    assert all(METHODS.get(name).paper.startswith("https://arxiv.org/abs/") for name in rates)
