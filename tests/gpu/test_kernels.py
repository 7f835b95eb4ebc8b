"""Attention implementations, fused losses, checkpointing, compilation and quantized layers on the GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peftkit.models import dtypes
from peftkit.models.kernels import linear_cross_entropy
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.head import head_of
from peftkit.training.step import TaskModule
from tests import tiny
from tests.gpu.conftest import relative
from tests.methods.every_method import INFOS, made_batch


def gradients(folder, model, device, dtype="float32", model_parts=None, training=None):
    """The loss and all gradients of one batch as one vector, and the built model's weights."""
    task = {"kind": "style" if model == "decoder" else "classification"}
    recipe = tiny.tiny_recipe(
        folder, task=task, data={"source": "none.csv", "max_length": 64}, training=training or {},
        model={"source": str(folder), "dtype": dtype, "dropout": 0.0, **(model_parts or {})},
        method={"kind": "lora", "rank": 4, "init_lora_weights": "gaussian"},
    )  # fmt: skip
    tokenizer, info = load_tokenizer(recipe.model), INFOS[model]
    loaded = build(recipe, info, tokenizer, device)
    trained = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained:  # equal on every device, and nothing is zero
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    module = TaskModule(loaded, head_of(info, recipe.task)).train()
    batch = {name: value.to(device) for name, value in made_batch(tokenizer, model).items()}
    with dtypes.autocast(getattr(torch, dtype), device):
        loss = module(batch)
    loss.backward()
    return loss, torch.cat([parameter.grad.flatten() for parameter in trained])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("model", "base"), [("encoder", "bert"), ("decoder", "llama")])
def test_attention_implementations_agree(materials, device, model, base, attention):
    loss, gradient = gradients(materials / base, model, device, model_parts={"attention": attention})
    expected, reference = gradients(materials / base, model, "cpu", model_parts={"attention": "eager"})
    assert relative(loss, expected) < 1e-4
    assert relative(gradient, reference) < 1e-3


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_changes_nothing(materials, device, mode, dtype):
    training = {"gradient_checkpointing": mode}
    loss, gradient = gradients(materials / "llama", "decoder", device, dtype, training=training)
    expected, reference = gradients(materials / "llama", "decoder", device, dtype)
    assert torch.equal(loss, expected)
    assert relative(gradient, reference) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("model", "base"), [("encoder", "bert"), ("decoder", "llama")])
def test_compiled_blocks_agree(materials, gpu, model, base):
    loss, gradient = gradients(materials / base, model, gpu, training={"compile": True})
    expected, reference = gradients(materials / base, model, gpu)
    assert relative(loss, expected) < 1e-4
    assert relative(gradient, reference) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [200, 40_000])
def test_the_chunked_loss_agrees_with_cross_entropy_in_fp64_twice(device, dtype, tokens):
    if device.type == "cpu" and (tokens > 1000 or dtype == torch.float16):
        pytest.skip("needs a CUDA GPU")
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(64, 1000, bias=False).to(device, dtype).requires_grad_(False)
    targets = torch.randint(0, 1000, (tokens,), generator=generator).to(device)
    output = linear_cross_entropy.OutputLayer(layer, layer.forward, linear_cross_entropy.Shaping(), 1000)
    hidden = torch.randn(tokens, 64, generator=generator).to(device, dtype)
    results = []
    for _ in range(2):
        leaf = hidden.clone().requires_grad_()
        value = linear_cross_entropy._sum(leaf, targets, output)
        value.backward()
        results.append((value.detach(), leaf.grad))
    exact = hidden.double().requires_grad_()
    expected = F.cross_entropy(exact @ layer.weight.double().T, targets, reduction="sum")
    expected.backward()
    bound = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    for value, gradient in results:
        assert relative(value, expected) < bound
        assert relative(gradient, exact.grad) < bound
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantized_layers_compute_with_the_weights_that_they_stand_for(gpu, materials, kind, dtype):
    pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")
    from peft.utils.integrations import dequantize_module_weight

    name = str(dtype).removeprefix("torch.")
    recipe = tiny.tiny_recipe(
        materials / "llama_64", model={"dtype": name}, quantization={"kind": kind}, task={"kind": "style"},
        method={"kind": "lora", "rank": 4, "init_lora_weights": "gaussian"},
    )  # fmt: skip
    model = build(recipe, INFOS["decoder"], load_tokenizer(recipe.model), gpu).model
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    x = torch.randn(2, 40, 64, device=gpu, dtype=dtype).requires_grad_()
    with dtypes.autocast(dtype, gpu):
        y = layer(x)
    y.float().square().sum().backward()
    weight = dequantize_module_weight(layer.base_layer).double()
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = x.detach().double().requires_grad_()
    expected = exact @ weight.T + layer.scaling["default"] * (exact @ a.T @ b.T)
    expected.square().sum().backward()
    bound = 5e-2 if kind == "int8" else {torch.float32: 1e-5}.get(dtype, 2e-2)
    assert relative(y, expected) < bound
    assert relative(x.grad, exact.grad) < bound
