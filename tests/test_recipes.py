"""The recipes of the checkout: each says what it must, and each is the variant that it claims to be."""

from __future__ import annotations

import ast
import re

import pytest

from peftkit import get_recipe
from peftkit.schema import catalog

FILES = catalog.built_in()


def test_the_recipes_that_are_promised_are_there():
    assert {
        "agnews_lora", "agnews_frozen", "agnews_full", "imdb_lora", "bbc_news_lora", "bbc_news_frozen", "own_csv",
    } <= set(FILES)  # fmt: skip


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_recipe_file_opens_with_its_command_its_needs_and_its_score(name):
    text = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))
    assert f"\n    accelerate launch recipes/{FILES[name].name}" in text
    assert re.search(r"^Needs: .+", text, re.MULTILINE)
    assert re.search(r"^Reached: .+", text, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(FILES))
def test_hub_sources_are_pinned_to_a_commit_and_others_to_none(name):
    recipe = get_recipe(name)
    for part in (recipe.model, recipe.data):
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", part.source) is not None
        assert bool(part.revision) == on_hub
        if on_hub:
            assert re.fullmatch(r"[0-9a-f]{40}", part.revision)


@pytest.mark.parametrize(("variant", "base"), [("agnews_frozen", "agnews_lora"), ("agnews_full", "agnews_lora"),
                                               ("bbc_news_frozen", "bbc_news_lora")])  # fmt: skip
def test_a_variant_differs_from_its_base_in_method_and_training_only(variant, base):
    one, other = get_recipe(variant).model_dump(), get_recipe(base).model_dump()
    assert {key for key in one if one[key] != other[key]} <= {"name", "method", "training"}
    assert one["method"]["kind"] != other["method"]["kind"]


QUANTIZED = {"agnews_qlora": "agnews_lora", "instruct_qlora": "instruct_alpaca_lora", "style_qlora": "style_kjv_lora"}


@pytest.mark.parametrize(("variant", "base"), QUANTIZED.items())
def test_a_quantized_variant_differs_in_quantization_only(variant, base):
    one, other = get_recipe(variant).model_dump(), get_recipe(base).model_dump()
    assert {key for key in one if one[key] != other[key]} == {"name", "quantization"}
    assert one["quantization"] == {"kind": "nf4", "double": True}
