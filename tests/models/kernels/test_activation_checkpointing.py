"""Gradients do not depend on which activations are kept, and a selective run repeats no product with weights."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import TaskInfo
from tests import tiny

LABELS = TaskInfo("single_label_classification", ("cat", "dog"))
TEXT = TaskInfo("causal_lm")
PRODUCTS = {"mm", "addmm"}
MODES = ("off", "selective", "full")


class Counted(TorchDispatchMode):
    """Counts the operations that really run."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        self.found[name] = self.found.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def gradients(folder, info, mode, **parts):
    """Trainable gradients by name of one backward pass with dropout, and how many products it took."""
    task = {"kind": "classification"} if info is LABELS else {"kind": "style"}
    recipe = tiny.tiny_recipe(folder, task=task, training={"gradient_checkpointing": mode}, **parts)
    loaded = build(recipe, info, load_tokenizer(recipe.model))
    model = loaded.model.train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(5, 90, (3, 17), generator=generator)
    torch.manual_seed(0)
    with Counted() as counted, torch.autocast("cpu", torch.bfloat16, enabled=recipe.model.dtype == "bfloat16"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(grad is not None for grad in found.values())
    return found, counted.found


BASES = {
    "bert": (tiny.tiny_bert, LABELS, {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}),
    "llama": (tiny.tiny_llama, TEXT, {"attention_dropout": 0.2}),
    "gpt2": (tiny.tiny_gpt2, TEXT, {"resid_pdrop": 0.2, "attn_pdrop": 0.2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpointing")
    return {name: (make(place / name, **config), info) for name, (make, info, config) in BASES.items()}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "parts",
    [
        {"method": {"kind": "lora", "rank": 4, "dropout": 0.3}},
        {"method": {"kind": "full"}},
        {"method": {"kind": "lora", "rank": 4, "dropout": 0.3}, "model": {"dtype": "bfloat16"}},
        {"method": {"kind": "lora", "rank": 4}, "quantization": {"kind": "nf4"}},
        {"method": {"kind": "lora", "rank": 4}, "quantization": {"kind": "int8"}},
    ],
    ids=["lora", "full", "bf16", "nf4", "int8"],
)
def test_gradients_are_the_same_bit_for_bit(folders, base, parts):
    folder, info = folders[base]
    (plain, _), *others = (gradients(folder, info, mode, **parts) for mode in MODES)
    for (found, _), mode in zip(others, MODES[1:]):
        assert found.keys() == plain.keys()
        for name, expected in plain.items():
            # torch's unfused attention over GPT-2's joint q, k, v repeats itself only to rounding
            reach = 2e-6 * expected.abs().max() if base == "gpt2" else 0.0
            assert (found[name] - expected).abs().max() <= reach, (mode, name)
    assert any(grad.abs().max() > 0 for grad in plain.values())


@pytest.mark.parametrize("base", BASES)
def test_only_full_repeats_the_products_with_weights(folders, base):
    folder, info = folders[base]
    counts = {mode: gradients(folder, info, mode, method={"kind": "full"})[1] for mode in MODES}
    products = {mode: sum(found.get(name, 0) for name in PRODUCTS) for mode, found in counts.items()}
    assert products["selective"] == products["off"] < products["full"]
    norms = {mode: sum(found.values()) for mode, found in counts.items()}
    assert norms["off"] < norms["selective"]


def test_truth_values_and_yaml_mean_the_modes():
    def mode(text):
        return tiny.tiny_recipe("base", training={"gradient_checkpointing": text}).training.gradient_checkpointing

    assert [mode(value) for value in (True, False, "off", "selective", "full")] == [
        "full", "off", "off", "selective", "full",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="gradient_checkpointing: input should be 'off', 'selective' or 'full'"):
        mode("partly")


def test_off_survives_yaml(tmp_path):
    recipe = tiny.tiny_recipe("base", training={"gradient_checkpointing": "off"})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(file) == recipe
