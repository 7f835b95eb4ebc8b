"""A model entered above its frozen blocks gives what the whole model gives, and learns what it would have learned."""

from __future__ import annotations

import pytest
import torch

from peftkit.data.batching import collate
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.head import head_of
from peftkit.schema.types import TaskInfo
from peftkit.training import frozen_trunk
from peftkit.training.step import TaskModule
from tests import tiny

INFO = TaskInfo("single_label_classification", ("a", "b", "c"))
CAUSAL = TaskInfo("causal_lm")
MAKERS = [tiny.tiny_bert, tiny.tiny_distilbert, tiny.tiny_roberta, tiny.tiny_gpt2, tiny.tiny_llama]
TEXTS = ["the game", "a market of stock and bank money for the first day", "new computer software", "team player " * 7]


def module_of(folder, info=INFO, **parts):
    recipe = tiny.tiny_recipe(folder, **parts)
    tokenizer = load_tokenizer(recipe.model)
    return TaskModule(build(recipe, info, tokenizer), head_of(info, recipe.task)), tokenizer


def batch_of(tokenizer, causal=False):
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    labels = rows if causal else [index % 3 for index in range(len(rows))]
    return collate({"input_ids": rows, "labels": labels, "weight": [1.0] * len(rows)}, tokenizer)


def find_trunk(module, batch):
    module.eval()
    trunk, reason = frozen_trunk.find_frozen_trunk(
        module.model, lambda b: module(dict(b), outputs=True), batch, module.pooling
    )
    if trunk:
        module.freeze_trunk(trunk)
    return trunk, reason


def gradients(module, batch):
    module.zero_grad()
    module(batch).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


def both_ways(module, batch):
    """Gradients of the model and of the one entered above its trunk, with the same features."""
    module.train()
    torch.manual_seed(0)
    whole = gradients(module, batch)
    with torch.no_grad():
        hidden = module.trunk.capture(lambda: module(dict(batch), outputs=True), batch)
    torch.manual_seed(0)
    return whole, gradients(module, {**module.trunk.reduced(batch), frozen_trunk.FEATURES: hidden})


def assert_equal(whole, above):
    assert whole.keys() == above.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(above[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max() + 1e-6))


@pytest.mark.parametrize("pooling", ["own", "mean", "cls"])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_frozen_backbone_needs_one_vector_per_row(maker, pooling, tmp_path):
    module, tokenizer = module_of(maker(tmp_path), method={"kind": "frozen"}, model={"pooling": pooling})
    batch = batch_of(tokenizer)
    trunk, _ = find_trunk(module, batch)
    assert trunk.is_backbone
    assert trunk.per_row
    assert_equal(*both_ways(module, batch))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("method", [{"kind": "top_k", "k": 1}, {"kind": "lora", "layers": -1, "rank": 2}])
def test_between_two_blocks_every_token_crosses(maker, method, tmp_path):
    module, tokenizer = module_of(maker(tmp_path), method=method)
    batch = batch_of(tokenizer)
    trunk, _ = find_trunk(module, batch)
    assert (trunk.cut, trunk.kind) == (1, "tokens")
    assert_equal(*both_ways(module, batch))


@pytest.mark.parametrize("maker", [tiny.tiny_gpt2, tiny.tiny_llama])
def test_a_language_model_s_upper_blocks(maker, tmp_path):
    module, tokenizer = module_of(
        maker(tmp_path), CAUSAL, method={"kind": "lora", "layers": -1, "rank": 2}, task={"kind": "style"}
    )
    batch = batch_of(tokenizer, causal=True)
    trunk, reason = find_trunk(module, batch)
    assert trunk is not None, reason
    assert trunk.cut == 1
    assert_equal(*both_ways(module, batch))


def test_checkpointed_blocks_are_run_again_on_the_same_input(llama):
    parts = {"method": {"kind": "lora", "layers": -1, "rank": 2}}
    module, tokenizer = module_of(llama, **parts, training={"gradient_checkpointing": True})
    plain, _ = module_of(llama, **parts)
    batch = batch_of(tokenizer)
    find_trunk(module, batch)
    _, above = both_ways(module, batch)
    plain.train()
    assert_equal(gradients(plain, batch), above)


@pytest.mark.parametrize(
    "method", [{"kind": "full"}, {"kind": "lora"}, {"kind": "lora", "layers": -1, "bias": "all"}], ids=str
)
def test_where_the_first_block_is_trained_there_is_no_trunk(bert, method):
    module, tokenizer = module_of(bert, method=method)
    trunk, reason = find_trunk(module, batch_of(tokenizer))
    assert trunk is None
    assert "first block" in reason


def test_dropout_is_off_in_the_trunk_and_on_above_it(tmp_path):
    folder = tiny.tiny_bert(tmp_path, hidden_dropout_prob=0.5)
    module, tokenizer = module_of(folder, method={"kind": "top_k", "k": 1})
    batch = batch_of(tokenizer)
    trunk, _ = find_trunk(module, batch)
    module.train()
    with torch.no_grad():
        first, second = (trunk.capture(lambda: module(batch), batch) for _ in range(2))
        assert torch.equal(first, second)
        assert module(batch) != module(batch)


def test_a_cut_point_that_changes_outputs_is_refused(bert, monkeypatch):
    """A block that also adds something of its own to what the next one is given."""
    module, tokenizer = module_of(bert, method={"kind": "lora", "layers": -1})
    block = frozen_trunk.find_blocks(module.model)[1][1]
    block.register_forward_pre_hook(lambda _, args: (args[0] + module.model.get_input_embeddings().weight.sum(),))
    calls = []
    block.register_forward_hook(lambda _, args, out: out + len(calls) if calls.append(1) is None else out)
    trunk, reason = find_trunk(module, batch_of(tokenizer))
    assert trunk is None
    assert "not give the same outputs" in reason


def test_replaced_forwards_are_restored(bert):
    module, tokenizer = module_of(bert, method={"kind": "frozen"})
    batch = batch_of(tokenizer)
    trunk, _ = find_trunk(module, batch)
    before = module(batch, outputs=True)["logits"]
    with pytest.raises(ZeroDivisionError), trunk.replay(torch.zeros(4, 32)):
        _ = 1 / 0
    assert torch.equal(module(batch, outputs=True)["logits"], before)
