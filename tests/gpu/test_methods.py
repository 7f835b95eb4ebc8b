"""Every method on the GPU gives the loss and the gradients that it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from peftkit.models import dtypes
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.head import head_of
from peftkit.training.step import TaskModule
from tests import tiny
from tests.gpu.conftest import relative
from tests.methods.every_method import EXAMPLES, INFOS, Cell, made_batch

QUANTIZATIONS = {"lora": (None, "nf4", "int8"), "lora-loftq": ("nf4",)}
QUICK = ("lora", "bottleneck-parallel", "prefix_tuning")
CELLS = [
    pytest.param(
        Cell(example, model, quantization),
        id=str(Cell(example, model, quantization)),
        marks=() if example in QUICK and quantization is None else pytest.mark.slow,
    )
    for example, about in EXAMPLES.items()
    for model in about.models
    for quantization in QUANTIZATIONS.get(example, (None,))
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of the tiny bases, wide enough for whole blocks of NF4."""
    folder = tmp_path_factory.mktemp("bases")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    llama = tiny.tiny_llama(folder / "llama", **wide)
    return {"encoder": tiny.tiny_bert(folder / "bert", **wide), "decoder": llama, "decoder-classifier": llama}


def losses_and_gradients(cell, folder, device, state=None, dtype="float32"):
    """A built model, and the loss and gradients of one batch, with the weights of another's ``state``."""
    recipe = cell.recipe(folder, model={"source": str(folder), "dtype": dtype, "dropout": 0.0})
    tokenizer, info = load_tokenizer(recipe.model), INFOS[cell.model]
    loaded = build(recipe, info, tokenizer, device)
    batch = made_batch(tokenizer, cell.model)
    recipe.method.initialize(loaded, [{name: value.to(device) for name, value in batch.items()}])
    recipe.method.on_train_begin(loaded.model, 6)
    if state is not None:
        copy_state(loaded.model, state)
    module = TaskModule(loaded, head_of(info, recipe.task)).train()
    with dtypes.autocast(getattr(torch, dtype), device):
        loss = module({name: value.to(device) for name, value in batch.items()})
    loss.backward()
    gradients = {name: p.grad for name, p in loaded.model.named_parameters() if p.requires_grad and p.grad is not None}
    return loaded, loss, gradients


def copy_state(model, state):
    """Copies the floating-point weights and buffers of equal names; quantized ones are the same already."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            source = state.get(name)
            if source is not None and source.shape == tensor.shape and tensor.is_floating_point():
                tensor.copy_(source.to(tensor.device))


def tensors(model):
    return dict((*model.named_parameters(), *model.named_buffers()))


@pytest.mark.parametrize("cell", CELLS)
def test_loss_and_gradients_are_those_of_the_cpu(cell, bases, device):
    if cell.quantization:
        pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")
    torch.manual_seed(0)
    loaded, loss, gradients = losses_and_gradients(cell, bases[cell.model], device)
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {device.type}
    _, expected, reference = losses_and_gradients(cell, bases[cell.model], "cpu", tensors(loaded.model))
    assert gradients.keys() ^ reference.keys() == set()
    assert gradients
    # each device rounds weights between two values of NF4 in its own way, and INT8 activations too
    bound = {"int8": 0.1, "nf4": 1e-2}.get(cell.quantization, 1e-3)
    assert relative(loss, expected) < bound
    whole = torch.cat([value.flatten().cpu() for value in gradients.values()])
    assert relative(whole, torch.cat([value.flatten() for value in reference.values()])) < bound


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_narrow_dtypes_are_near_fp32(model, dtype, bases, device):
    cell = Cell("lora", model, None)
    loaded, loss, gradients = losses_and_gradients(cell, bases[model], device, dtype=dtype)
    _, expected, reference = losses_and_gradients(cell, bases[model], "cpu", tensors(loaded.model))
    assert relative(loss, expected) < 2e-2
    whole = torch.cat([value.flatten().cpu() for value in gradients.values()])
    assert relative(whole, torch.cat([value.flatten() for value in reference.values()])) < 6e-2
