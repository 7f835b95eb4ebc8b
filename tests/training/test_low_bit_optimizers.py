"""bitsandbytes' optimizers: near torch's AdamW, a quarter of its state, saved and resumed exactly, refused in time."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import peftkit
from peftkit import replace
from peftkit.errors import RecipeError
from peftkit.models.quantization import bitsandbytes_support
from peftkit.training import low_bit_optimizers
from peftkit.training.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from tests import tiny

WIDE = (96, 128)
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="paged memory is CUDA's")
NAMES = ["adamw_8bit", pytest.param("paged_adamw_8bit", marks=ON_CUDA), pytest.param("paged_adamw", marks=ON_CUDA)]


class Small(torch.nn.Module):
    """One matrix that is large enough for 8 bits, and one vector that is not."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.nn.Parameter(torch.randn(WIDE, generator=generator))
        self.vector = torch.nn.Parameter(torch.randn(128, generator=generator))

    def forward(self, x):
        return torch.tanh(x @ self.matrix) + self.vector


def made(name, device=None, **training):
    module = Small().to(device or ("cuda" if name.startswith("paged") else "cpu"))
    recipe = tiny.tiny_recipe("base", training={"optimizer": name, "learning_rate": 1e-2, **training})
    return module, build_optimizer(module, recipe)


def step(module, optimizer, count, start=0):
    for number in range(start, start + count):
        x = torch.randn(16, 96, generator=torch.Generator().manual_seed(number))
        module(x.to(module.matrix.device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_where_torchs_adamw_goes(name):
    ours, second = made(name)
    exact, first = made("adamw", ours.matrix.device)
    start = exact.matrix.detach().clone()
    step(exact, first, 12)
    step(ours, second, 12)
    way = exact.matrix - start
    error = (ours.matrix - exact.matrix).norm() / way.norm()
    assert error < (0.1 if name.endswith("8bit") else 1e-4)
    torch.testing.assert_close(ours.vector, exact.vector, rtol=0, atol=5e-4)  # vectors keep fp32 moments


@pytest.mark.parametrize("name", NAMES)
def test_betas_eps_and_weight_decay_arrive(name):
    plain, optimizer = made(name)
    step(plain, optimizer, 4)
    for change in ({"betas": (0.5, 0.6)}, {"eps": 1e-1}, {"weight_decay": 0.9}):
        other, changed = made(name, **change)
        step(other, changed, 4)
        assert not torch.equal(other.matrix, plain.matrix), change


def test_moments_of_matrices_take_a_byte_each():
    module, optimizer = made("adamw_8bit")
    step(module, optimizer, 1)
    saved = optimizer_tensors(module, optimizer)
    assert saved["matrix/state1"].dtype == saved["matrix/state2"].dtype == torch.uint8
    assert saved["vector/state1"].dtype == torch.float32
    size = sum(tensor.numel() * tensor.element_size() for name, tensor in saved.items() if name.startswith("matrix"))
    numbers = math.prod(WIDE)
    assert size == 2 * numbers + 2 * 4 * math.ceil(numbers / 256) + 8  # bytes, a scale for 256, and the step


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_goes_on_bit_for_bit(name, tmp_path):
    from safetensors.torch import load_file, save_file

    whole, first = made(name)
    step(whole, first, 6)
    half, second = made(name)
    step(half, second, 3)
    save_file(
        {key: value.clone() for key, value in optimizer_tensors(half, second).items()}, tmp_path / "o.safetensors"
    )
    again, third = made(name)
    again.load_state_dict(half.state_dict())
    load_optimizer_tensors(again, third, load_file(tmp_path / "o.safetensors"))
    step(again, third, 3, start=3)
    assert torch.equal(again.matrix, whole.matrix)
    assert torch.equal(again.vector, whole.vector)


@pytest.mark.parametrize(("name", "instead"), [("paged_adamw", "adamw"), ("paged_adamw_8bit", "adamw_8bit")])
def test_nothing_is_paged_on_a_cpu(small_recipe, name, instead):
    with pytest.raises(RecipeError, match=f"{name} pages its state out of a CUDA GPU's memory.*use {instead}$"):
        low_bit_optimizers.check(name, "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="this run is on cpu"):
            peftkit.train(replace(small_recipe, training={"optimizer": name}), quiet=True)


def test_what_cannot_work_is_said_before_training(monkeypatch):
    low_bit_optimizers.check("adamw", "cpu", sharded=True)
    with pytest.raises(RecipeError, match="does not support sharded parameters; use adamw"):
        low_bit_optimizers.check("adamw_8bit", "cpu", sharded=True)
    low_bit_optimizers.check("adamw_8bit", "cpu")
    monkeypatch.setattr(low_bit_optimizers, "_failure", lambda name, device: "no kernel")
    with pytest.raises(RecipeError, match=r"does not work on mps with this bitsandbytes \(no kernel\); use adamw"):
        low_bit_optimizers.check("adamw_8bit", "mps")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(bitsandbytes_support, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'peftkit\[quantization\]'"):
        low_bit_optimizers.check("adamw_8bit", "cpu")


def test_the_probe_notices_a_step_that_does_nothing(monkeypatch):
    class Idle:
        def step(self):
            pass

    monkeypatch.setattr(low_bit_optimizers, "build", lambda *arguments, **options: Idle())
    assert low_bit_optimizers._failure.__wrapped__("adamw_8bit", "cpu") == "a step changes nothing"
