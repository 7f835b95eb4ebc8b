"""The table of what is trained, against counts by hand."""

from __future__ import annotations

import torch

from peftkit.models.inventory import trainable_table
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.types import TaskInfo
from tests import tiny

INFO = TaskInfo("single_label_classification", ("a", "b", "c"))


def build_model(folder, **parts):
    recipe = tiny.tiny_recipe(folder, **parts)
    return build(recipe, INFO, load_tokenizer(recipe.model)).model


def test_lora_rows_count_adapters_and_head(bert):
    model = build_model(bert, model={"dtype": "bfloat16"}, method={"rank": 4, "target_modules": ["query", "value"]})
    trained = {row.part: row for row in trainable_table(model) if row.trainable}
    assert set(trained) == {"bert.encoder.layer (lora)", "classifier"}
    adapters = trained["bert.encoder.layer (lora)"]
    assert adapters.parameters == 2 * 2 * 4 * (32 + 32)  # blocks × modules × rank × (in + out)
    assert (adapters.dtype, adapters.bytes) == ("float32", 4 * adapters.parameters)
    assert trained["classifier"].parameters == 32 * 3 + 3
    frozen = [row for row in trainable_table(model) if not row.trainable]
    assert {row.dtype for row in frozen} == {"bfloat16"}
    assert all(row.bytes == 2 * row.parameters for row in frozen)


def test_the_rows_add_up_to_the_model(bert):
    model = build_model(bert, method={"kind": "top_k", "k": 1})
    rows = trainable_table(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row.parameters for row in rows if row.trainable) == trained > 0
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters()) > trained


def test_any_module_can_be_listed():
    rows = trainable_table(torch.nn.Linear(2, 3))
    assert [(row.part, row.parameters) for row in rows] == [("weight", 6), ("bias", 3)]
