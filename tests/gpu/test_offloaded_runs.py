"""Offloaded blocks on the GPU: the same run, in less memory, and copies that run next to computations."""

from __future__ import annotations

import gc

import pytest
import torch

import peftkit
from peftkit import replace
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning.devices import Device
from peftkit.planning.plan import make_plan
from peftkit.schema.head import head_of
from peftkit.training import flops
from peftkit.training.step import TaskModule
from tests import tiny
from tests.gpu.test_runs import short, whole
from tests.methods.every_method import INFOS, made_batch
from tests.planning.test_plan import known_of


@pytest.mark.slow
@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["style", "nf4"])
def test_an_offloaded_run_ends_with_the_same_bytes(name, to, materials, tmp_path, device):
    if device.type == "cpu" and to == "cpu":
        pytest.skip("needs a CUDA GPU")
    base = tiny.tiny_llama(tmp_path / "base", hidden_size=64, intermediate_size=128, num_hidden_layers=5)
    recipe = short(name, materials, tmp_path, model={"source": str(base)}, export={"prove": False})
    if name == "nf4":
        recipe = replace(recipe, training={"gradient_checkpointing": "full"})
    plain, offloaded = (peftkit.train(replace(recipe, model={"offload": each}), quiet=True) for each in (None, to))
    if name != "nf4" or device.type == "cpu":  # blocks are quantized before they leave the CPU, which rounds otherwise
        assert whole(offloaded) == whole(plain)
    assert peftkit.load(offloaded.path, device=str(device)).generate(["the game"], max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_memory_has_two_blocks(to, tmp_path, gpu):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "initializer_range": 0.02}
    base = tiny.tiny_llama(tmp_path / "base", **sizes)
    parts = {"task": {"kind": "style"}, "method": {"kind": "lora", "rank": 4}}
    peaks = {}
    work_once(gpu)
    for each in (None, to):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        recipe = tiny.tiny_recipe(base, model={"dtype": "bfloat16", "offload": each}, **parts)
        tokenizer = load_tokenizer(recipe.model)
        module = TaskModule(build(recipe, INFOS["decoder"], tokenizer, gpu), head_of(INFOS["decoder"], recipe.task))
        batch = {name: value.to(gpu) for name, value in made_batch(tokenizer, "decoder").items()}
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16):
                module.train()(batch).backward()
        torch.cuda.synchronize()
        peaks[each] = torch.cuda.max_memory_allocated() - before
        del module, batch
    block = 2 * (4 * 1024 * 1024 - 1024 * 1024 + 3 * 1024 * 4096)  # fewer key heads
    assert peaks[None] - peaks[to] > 4 * block
    assert peaks[to] < 4 * block


def work_once(gpu) -> None:
    """Forward and backward, so that cuBLAS has its workspaces (some 80 MB), which the process keeps."""
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(512, 512, device=gpu, dtype=dtype, requires_grad=True)
        (weight @ weight).sum().backward()
    torch.cuda.synchronize()


@pytest.mark.slow
def test_the_plan_is_what_is_allocated(materials, tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(flops, "matmul_rate", lambda *arguments: 1e12)  # measuring it takes more than this run
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "initializer_range": 0.02}
    base = tiny.tiny_llama(tmp_path / "base", **sizes)
    model = {"source": str(base), "dtype": "bfloat16", "offload": "cpu"}
    recipe = short("style", materials, tmp_path, model=model, export={"prove": False})
    plan = make_plan(recipe, Device("GPU", 10**12, True), known_of(recipe))
    planned = next(phase for phase in plan.phases if phase.name == "forward and backward")
    work_once(gpu)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    peftkit.train(recipe, quiet=True)
    tensors = planned.total - planned.parts["framework"]
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(tensors, rel=0.2)
