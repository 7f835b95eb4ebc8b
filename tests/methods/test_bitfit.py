"""BitFit trains biases and the head, and refuses bases without biases."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from peftkit.errors import MethodError, RecipeError
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.registries import METHODS
from peftkit.schema.types import TaskInfo
from tests import tiny

LABELS = TaskInfo("single_label_classification", ("cat", "dog"))
TEXT = TaskInfo("causal_lm")
IDS = torch.arange(5, 25)[None]


def made(folder, info=LABELS, **parts):
    task = {"kind": "classification"} if info is LABELS else {"kind": "style"}
    recipe = tiny.tiny_recipe(folder, task=task, **{"method": {"kind": "bitfit"}, **parts})
    return build(recipe, info, load_tokenizer(recipe.model)).model


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_biases_and_head_are_trained_and_nothing_else(bert):
    model = made(bert)
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert "bert.encoder.layer.1.output.LayerNorm.bias" in biases
    assert trained(model) == biases | {"classifier.weight", "bert.pooler.dense.weight"} & trained(model)
    assert "classifier.weight" in trained(model)
    share = sum(p.numel() for p in model.parameters() if p.requires_grad) / sum(p.numel() for p in model.parameters())
    assert share < 0.1


def test_a_decoder_with_biases_has_gradients_for_all_of_them(tmp_path):
    model = made(tiny.tiny_gpt2(tmp_path / "gpt2"), TEXT)
    assert trained(model) == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    model.train()(input_ids=IDS).logits.square().mean().backward()
    assert all(model.get_parameter(name).grad is not None for name in trained(model))


def test_bf16_keeps_trained_biases_and_their_norms_in_fp32(bert):
    model = made(bert, model={"dtype": "bfloat16"})
    assert {model.get_parameter(name).dtype for name in trained(model)} == {torch.float32}
    layer = model.bert.encoder.layer[0]
    assert layer.output.LayerNorm.weight.dtype == torch.float32
    assert not layer.output.LayerNorm.weight.requires_grad
    assert layer.attention.self.query.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float().square().mean()
    loss.backward()
    assert layer.output.LayerNorm.bias.grad.abs().max() > 0


def test_a_base_without_biases_is_refused_before_and_after_loading(llama, bert):
    said = "method.kind=bitfit trains biases, and llama models have none; use method.kind=ln_tuning"
    with pytest.raises(MethodError, match=said):
        made(llama, TEXT)
    method = METHODS.get("bitfit")()
    recipe = tiny.tiny_recipe(llama, method={"kind": "bitfit"})
    with pytest.raises(MethodError, match=said):
        method.check_base(AutoConfig.from_pretrained(llama), recipe)
    method.check_base(AutoConfig.from_pretrained(bert), recipe)


def test_quantized_bases_are_refused(bert):
    with pytest.raises(RecipeError, match=r"bitfit cannot train over weights with quantization.kind=nf4"):
        tiny.tiny_recipe(bert, method={"kind": "bitfit"}, quantization={"kind": "nf4"})
