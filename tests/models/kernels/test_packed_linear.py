"""The packed output layer against torch's own matmul."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from peftkit.models.kernels import packed_linear
from tests import tiny

needs_onednn = pytest.mark.skipif(not packed_linear.is_supported(), reason="this build of torch has no oneDNN")


@pytest.fixture
def model(tmp_path):
    folder = tiny.tiny_llama(tmp_path / "llama")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@needs_onednn
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_logits_are_those_of_torch(model, rows):
    ids = torch.arange(rows * 3).view(rows, 3)
    before = model(input_ids=ids, logits_to_keep=1).logits
    state = set(model.state_dict())
    assert packed_linear.pack_output_layer(model)
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=1).logits, before, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == state
    assert model.lm_head.weight is model.get_input_embeddings().weight


@needs_onednn
def test_several_rows_read_the_packed_weight_and_one_row_the_other(model):
    packed_linear.pack_output_layer(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    x = torch.ones(2, model.config.hidden_size)
    assert model.lm_head(x).abs().max() > 0
    assert model.lm_head(x[:1]).abs().max() == 0


def test_what_is_trained_or_in_half_precision_is_left(model):
    model.lm_head.weight.requires_grad_(True)
    assert not packed_linear.pack_output_layer(model)
    assert not packed_linear.pack_output_layer(model.requires_grad_(False).to(torch.bfloat16))
    assert type(model.lm_head) is torch.nn.Linear
