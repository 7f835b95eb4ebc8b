"""The leaner RMSNorm against transformers' own layers: the same bits forward, autograd's gradients backward."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftkit.models.kernels.rms_norm import rms_norm, use_cpu_rms_norm

SMALL = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


def layers(width=48):
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(width, eps=1e-5)
    theirs.weight.data.normal_(1, 0.3)
    ours = copy.deepcopy(theirs)
    assert use_cpu_rms_norm(torch.nn.Sequential(ours)) == 1
    return theirs, ours


def outcome(layer, x, upstream):
    x = x.clone().requires_grad_()
    out = layer(x)
    return [out, *torch.autograd.grad(out, (x, layer.weight), upstream.to(out.dtype))]


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_bits_and_no_less_exact_gradients(dtype, held):
    theirs, ours = (layer.to(held) for layer in layers())
    x, upstream = torch.randn(3, 50, 48).to(dtype), torch.randn(3, 50, 48).to(dtype)
    expected, got = outcome(theirs, x, upstream), outcome(ours, x, upstream)
    assert torch.equal(got[0], expected[0])
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    exact = outcome(copy.deepcopy(theirs).double(), x.double(), upstream)
    for ours_, theirs_, truth in zip(got[1:], expected[1:], exact[1:], strict=True):
        allowed = 1.2 * (theirs_ - truth).norm() + 1e-4 * truth.norm()
        assert (ours_ - truth).norm() < allowed


def test_keeps_its_input_and_a_number_a_token_and_skips_what_is_frozen():
    _, ours = layers()
    ours.bfloat16().weight.requires_grad_(False)
    x, kept = torch.randn(7, 48, dtype=torch.bfloat16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ours(x)
    assert sum(t.numel() for t in kept) == x.numel() + 48 + 7
    out.sum().backward()
    assert x.grad is not None
    assert ours.weight.grad is None


def test_fp32_goes_the_way_of_transformers():
    theirs, ours = layers()
    x, upstream = torch.randn(5, 48), torch.randn(5, 48)
    for got, expected in zip(outcome(ours, x, upstream), outcome(theirs, x, upstream), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("config", "count"),
    [(LlamaConfig, 5), (MistralConfig, 5), (Qwen2Config, 5), (Qwen3Config, 9), (Gemma2Config, 0)],
)
def test_which_models_it_is_for(config, count):
    """Gemma's layer has another formula under a like name."""
    torch.manual_seed(0)
    options = {"head_dim": 8} if config in (Qwen3Config, Gemma2Config) else {}
    model = AutoModelForCausalLM.from_config(config(**SMALL, **options)).bfloat16().eval()
    ours = copy.deepcopy(model)
    assert use_cpu_rms_norm(ours) == count
    ids = torch.randint(3, 101, (2, 12))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, model(ids).logits)
    assert ours.state_dict().keys() == model.state_dict().keys()


def test_a_width_of_one_token_and_gradcheck_in_wide_statistics():
    torch.manual_seed(0)
    x = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(rms_norm(x.half(), weight, 1e-6).double().sum(), (x, weight))
    wanted = torch.autograd.grad((weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).sum(), (x, weight))
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)
