"""NF4 and INT8 bases: what is quantized, and gradients that an evaluation leaves alone."""

from __future__ import annotations

import pytest
import torch

from peftkit.errors import MethodError, ModelError, RecipeError
from peftkit.models import dtypes, pooled_logits
from peftkit.models.loading import build
from peftkit.models.quantization import bitsandbytes_support
from peftkit.models.third_party import silence_libraries
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.registries import QUANTIZATIONS
from peftkit.schema.types import TaskInfo
from tests import tiny

pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")

INFO = TaskInfo("single_label_classification", ("a", "b", "c"))
WIDE = {
    tiny.tiny_bert: {"hidden_size": 64, "intermediate_size": 128},
    tiny.tiny_gpt2: {"n_embd": 64},
    tiny.tiny_llama: {"hidden_size": 64, "intermediate_size": 128},
}
KINDS = [{"kind": "nf4"}, {"kind": "nf4", "double": False}, {"kind": "int8"}]


def made(folder, quantization, dtype="bfloat16", info=INFO):
    recipe = tiny.tiny_recipe(
        folder,
        quantization=quantization,
        model={"dtype": dtype, "dropout": 0.0, "pooling": "own"},
        method={"init_lora_weights": "gaussian"},
    )
    return build(recipe, info, load_tokenizer(recipe.model))


def gradients(loaded, batch, dtype):
    loaded.model.train()
    loaded.model.zero_grad()
    with dtypes.autocast(dtype):
        pooled_logits.logits(loaded.model, batch, "own").square().mean().backward()
    return {name: p.grad.clone() for name, p in loaded.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("maker", WIDE)
@pytest.mark.parametrize("quantization", KINDS, ids=["nf4-double", "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_equal_bit_for_bit_after_an_evaluation(maker, quantization, dtype, tmp_path):
    loaded = made(maker(tmp_path, **WIDE[maker]), quantization, dtype)
    batch = dict(loaded.tokenizer(["hello world", "the king said no"], padding=True, return_tensors="pt"))
    held = getattr(torch, dtype)
    before = gradients(loaded, batch, held)
    loaded.model.eval()
    with torch.no_grad(), dtypes.autocast(held):
        pooled_logits.logits(loaded.model, batch, "own")
    after = gradients(loaded, batch, held)
    assert before.keys() == after.keys()
    assert len(before) > 10
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name
        assert gradient.isfinite().all()


def test_the_guard_turns_off_every_layer_that_would_repack(tmp_path):
    from bitsandbytes.nn import Linear4bit

    model = made(tiny.tiny_bert(tmp_path, **WIDE[tiny.tiny_bert]), {"kind": "nf4"}).model
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * 6
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    layers[0].support_avx512bf16_for_cpu = True
    bitsandbytes_support.keep_gradients(model)
    assert not layers[0].support_avx512bf16_for_cpu


@pytest.mark.parametrize("quantization", KINDS[::2], ids=["nf4", "int8"])
def test_heads_embeddings_and_adapters_are_never_quantized(quantization, tmp_path):
    model = made(tiny.tiny_bert(tmp_path, **WIDE[tiny.tiny_bert]), quantization).model
    integers = {name for name, p in model.named_parameters() if not p.is_floating_point()}
    assert len(integers) == 12
    assert all(".encoder.layer." in name and "lora_" not in name for name in integers)
    floating = {p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad}
    assert floating == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_output_embeddings_of_a_language_model_stay(tmp_path):
    folder = tiny.tiny_llama(tmp_path, **WIDE[tiny.tiny_llama], tie_word_embeddings=False)
    model = made(folder, {"kind": "nf4"}, info=TaskInfo("causal_lm")).model
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_double_quantization_and_threshold_arrive(tmp_path):
    folder = tiny.tiny_bert(tmp_path, **WIDE[tiny.tiny_bert])

    def nested(double):
        model = made(folder, {"kind": "nf4", "double": double}).model
        return {bool(p.quant_state.nested) for p in model.parameters() if hasattr(p, "quant_state")}

    assert (nested(True), nested(False)) == ({True}, {False})
    int8 = made(folder, {"kind": "int8", "threshold": 2.5}).model
    assert {module.state.threshold for module in int8.modules() if hasattr(module, "state")} == {2.5}


def test_missing_bitsandbytes_says_the_install_line(monkeypatch):
    monkeypatch.setattr(bitsandbytes_support, "find_spec", lambda name: None)
    for kind in ("nf4", "int8"):
        with pytest.raises(ModelError, match=r"pip install 'peftkit\[quantization\]'"):
            QUANTIZATIONS.get(kind)().load_arguments(tiny.tiny_recipe("x").model, ())


@pytest.mark.parametrize(
    "method", [{"kind": "full"}, {"kind": "top_k"}, {"kind": "lora", "init_lora_weights": "pissa"}]
)
def test_methods_that_need_whole_weights_are_refused(method):
    with pytest.raises((MethodError, RecipeError), match="quantiz"):
        tiny.tiny_recipe("x", method=method, quantization={"kind": "nf4"})


@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (100, 200), (33, 64), (5, 48)])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_weights_of_any_width_are_unpacked_by_their_own_scales(shape, block, dtype):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    silence_libraries()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=block)
    numbers = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: weight.numel()]
    scales = state.absmax.repeat_interleave(block)[: weight.numel()]
    by_hand = (state.code[numbers.long()] * scales).view(shape).to(dtype)
    torch.testing.assert_close(dequantize_4bit(packed, state), by_hand, rtol=1e-2, atol=1e-4)
