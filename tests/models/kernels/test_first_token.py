"""A last block that computes the first token only: the scores and gradients of the whole block, where that is so."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    RobertaConfig,
)

from peftkit.models import pooled_logits
from peftkit.models.kernels import first_token

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_labels": 3, "initializer_range": 0.3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
KNOWN = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, pad_token_id=1),
    "electra": ElectraConfig(**SIZES, embedding_size=32),
}


def model_of(config, **options):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config, **options)


def batch(side="right"):
    ids = torch.randint(2, 99, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 5, 3, 1)):
        mask[row, length:] = 0
    mask = mask if side == "right" else mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask}


def outcome(model, inputs):
    logits = pooled_logits.logits(model, inputs, "own")
    grads = torch.autograd.grad(logits.square().sum(), [p for p in model.parameters() if p.requires_grad])
    return logits, grads


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", KNOWN)
def test_scores_and_gradients_are_those_of_the_whole_block(name, attention):
    whole = model_of(KNOWN[name], attn_implementation=attention).double()
    for parameter in whole.base_model.embeddings.parameters():
        parameter.requires_grad_(False)
    short = copy.deepcopy(whole)
    assert first_token.shorten_last_block(short)
    for inputs in (batch(), batch("left"), {"input_ids": batch()["input_ids"]}):
        if "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        (expected, wanted), (got, found) = outcome(whole, inputs), outcome(short, inputs)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_less_is_computed_and_elsewhere_every_token_is():
    from torch.utils.flop_counter import FlopCounterMode

    model = model_of(KNOWN["bert"]).eval()
    inputs = batch()
    with FlopCounterMode(display=False) as whole:
        pooled_logits.logits(model, inputs, "own")
    assert first_token.shorten_last_block(model)
    with FlopCounterMode(display=False) as short:
        pooled_logits.logits(model, inputs, "own")
    assert short.get_total_flops() < 0.75 * whole.get_total_flops()
    assert model.base_model(**inputs).last_hidden_state.shape == (4, 9, 32)


def test_a_low_rank_adapter_on_the_last_block_learns_the_same():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["query", "value", "dense"], init_lora_weights=False, task_type="SEQ_CLS")
    whole = get_peft_model(model_of(KNOWN["bert"]), config).double()
    short = copy.deepcopy(whole)
    assert first_token.shorten_last_block(short)
    for mine, theirs in zip(outcome(short, batch())[1], outcome(whole, batch())[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_head_that_reads_other_tokens_is_left_alone():
    class Mean(torch.nn.Module):
        def __init__(self, pooler):
            super().__init__()
            self.dense = pooler.dense

        def forward(self, hidden_states):
            return self.dense(hidden_states.mean(1))

    model = model_of(KNOWN["bert"])
    model.bert.pooler = Mean(model.bert.pooler)
    assert not first_token.shorten_last_block(model)
    assert "forward" not in vars(model.bert.encoder.layer[-1])
    for config in (DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48), LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )):  # fmt: skip
        assert not first_token.shorten_last_block(model_of(config))
