"""Attention implementations, fused losses, checkpointing, compilation and quantized layers on the GPU."""

from __future__ import annotations

import importlib.util

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


FUSED = ("cut_cross_entropy", "liger_kernel", None)


@pytest.mark.parametrize("library", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fused_losses_agree_with_cross_entropy_in_fp64(gpu, monkeypatch, library, dtype):
    if library and not importlib.util.find_spec(library):
        pytest.skip(f"{library} is not installed")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real(name) if name == library else None)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 64, generator=generator).to(gpu, dtype).requires_grad_()
    layer = torch.nn.Linear(64, 1000, bias=False).to(gpu, dtype).requires_grad_(False)
    targets = torch.randint(0, 1000, (200,), generator=generator).to(gpu)
    output = linear_cross_entropy.OutputLayer(layer, layer.forward, linear_cross_entropy.Shaping(), 1000)
    value = linear_cross_entropy._sum(hidden, targets, output)
    (3 * value).backward()
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ layer.weight.double().T, targets, reduction="sum")
    (3 * expected).backward()
    bound = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    assert relative(value, expected) < bound
    assert relative(hidden.grad, exact.grad) < bound


@pytest.mark.parametrize("library", FUSED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_learns_the_same_with_every_fused_loss(gpu, materials, monkeypatch, library, dtype):
    if library and not importlib.util.find_spec(library):
        pytest.skip(f"{library} is not installed")
    real = importlib.util.find_spec
    hidden = set(FUSED) - {library, None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else real(name, *rest))
    loss, gradient = gradients(materials / "llama_64", "decoder", gpu, dtype)
    expected, reference = gradients(materials / "llama_64", "decoder", "cpu")
    bound = 1e-3 if dtype == "float32" else 6e-2
    assert relative(loss, expected) < bound
    assert relative(gradient, reference) < bound


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
