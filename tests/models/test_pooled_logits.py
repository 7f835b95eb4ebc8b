"""Classifier logits against plain transformers: pooled before the head, both padding sides, wrapped by peft."""

from __future__ import annotations

import pytest
import torch

from peftkit.models import pooled_logits
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.types import TaskInfo
from tests import tiny

INFO = TaskInfo("single_label_classification", ("a", "b", "c"))
TEXTS = ["hello world", "the king said a very bad thing to the new team", "no"]
MAKERS = [tiny.tiny_bert, tiny.tiny_distilbert, tiny.tiny_roberta, tiny.tiny_gpt2, tiny.tiny_llama]


def made(folder, method="lora", pooling="own", dtype="float32"):
    recipe = tiny.tiny_recipe(folder, model={"pooling": pooling, "dtype": dtype}, method={"kind": method})
    loaded = build(recipe, INFO, load_tokenizer(recipe.model))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    loaded.model.eval()
    return loaded


def batch_of(tokenizer, texts=TEXTS):
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("method", ["lora", "frozen", "full"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@torch.no_grad()
def test_pooled_before_the_head_equals_pooled_token_logits(maker, method, pooling, tmp_path):
    loaded = made(maker(tmp_path), method, pooling)
    batch = batch_of(loaded.tokenizer)
    found = pooled_logits.logits(loaded.model, batch, pooling)
    inputs = {name: tensor for name, tensor in batch.items() if name != "token_type_ids"}
    tokens = loaded.model(**inputs).logits
    for row, mask in enumerate(batch["attention_mask"].bool()):
        real = tokens[row][mask]
        expected = real.mean(0) if pooling == "mean" else real[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled_logits.plain_logits(loaded.model, batch, pooling), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("maker", [tiny.tiny_gpt2, tiny.tiny_llama])
@pytest.mark.parametrize("pooling", ["own", "mean", "cls"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_decoder_equals_unpadded_on_both_sides(maker, pooling, side, tmp_path):
    loaded = made(maker(tmp_path), pooling=pooling)
    loaded.tokenizer.padding_side = side
    batch = batch_of(loaded.tokenizer)
    if side == "left":  # as a generation loop would: positions count real tokens
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found = pooled_logits.logits(loaded.model, batch, pooling)
    for row, text in enumerate(TEXTS):
        alone = pooled_logits.logits(loaded.model, batch_of(loaded.tokenizer, [text]), pooling)
        torch.testing.assert_close(found[row], alone[0], rtol=1e-4, atol=1e-5)


def test_gradients_reach_head_and_adapter_through_the_pool(bert):
    loaded = made(bert, pooling="mean")
    pooled_logits.logits(loaded.model, batch_of(loaded.tokenizer), "mean").square().sum().backward()
    without = [name for name, p in loaded.model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("pooling", ["own", "mean"])
def test_bf16_weights_under_autocast(bert, pooling):
    loaded, exact = made(bert, pooling=pooling, dtype="bfloat16"), made(bert, pooling=pooling)
    exact.model.load_state_dict(loaded.model.state_dict())
    batch = batch_of(loaded.tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = pooled_logits.logits(loaded.model, batch, pooling)
    assert rough.dtype == torch.float32
    fine = pooled_logits.logits(exact.model, batch, pooling)
    assert (rough - fine).abs().max() < 0.1 * fine.std() + 0.05


def test_pool_ignores_what_is_masked():
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    mean = pooled_logits.pool(hidden, mask, "mean")
    torch.testing.assert_close(mean[0], hidden[0, :2].mean(0))
    torch.testing.assert_close(mean[1], hidden[1, 2:].mean(0))
    torch.testing.assert_close(pooled_logits.pool(hidden, mask, "cls"), torch.stack([hidden[0, 0], hidden[1, 2]]))


def test_no_hook_is_left_behind(bert):
    loaded = made(bert, pooling="mean")
    with pytest.raises(AttributeError):
        pooled_logits.logits(loaded.model, {"input_ids": "no tensor", "attention_mask": torch.ones(1, 1)}, "mean")
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


def test_head_that_is_not_linear_is_pooled_after_it():
    class Model(torch.nn.Module):
        base_model_prefix = "base"

        def __init__(self):
            super().__init__()
            self.base = torch.nn.Embedding(10, 4)
            self.head = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Tanh())

        def forward(self, input_ids):
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.head(self.base(input_ids)))

    model, ids = Model(), torch.tensor([[1, 2, 3]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model(ids).logits.mean(1)
    torch.testing.assert_close(pooled_logits.logits(model, batch, "mean"), expected)
