"""Whole runs on the GPU: every golden recipe, other dtypes and optimizers, resuming, memory that runs out, NCCL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peftkit
from peftkit import replace
from peftkit.errors import Interrupted
from tests.golden import recipes
from tests.gpu.conftest import relative

ROOT = Path(__file__).parents[2]
NAMES = [pytest.param(name, marks=() if name == "lora" else pytest.mark.slow) for name in recipes.CHANGES]


def weights(run) -> dict[str, torch.Tensor]:
    exported = run.path / "adapter" if (run.path / "adapter").is_dir() else run.path / "model"
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(exported.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def vector(run) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in weights(run).values()])


def whole(run) -> dict[str, float]:
    """The bytes of the exported files."""
    exported = run.path / "adapter" if (run.path / "adapter").is_dir() else run.path / "model"
    return {file.name: file.read_bytes() for file in sorted(exported.glob("*.safetensors"))}


def short(name, materials, tmp_path, **parts):
    """A golden recipe, a few steps long, with the proof of its export."""
    if name == "nf4":
        pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")
    recipe = recipes.recipe(name, materials, tmp_path / "runs")
    return replace(recipe, **{"export": {"prove": True}, **parts})


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains_exports_with_proof_and_predicts_on_both(name, materials, tmp_path, device):
    evaluation = {"evaluation": {"baselines": ["majority", "zero_shot"]}} if name == "lora" else {}
    run = peftkit.train(short(name, materials, tmp_path, **evaluation), quiet=True)
    if device.type == "cuda":
        assert run.metrics["training"]["peak_gpu_memory_bytes"] > 0
        text = (run.path / "environment.json").read_text(encoding="utf-8")
        assert torch.cuda.get_device_name(0) in text
    proof = json.loads(next(run.path.rglob("proof.json")).read_text(encoding="utf-8"))
    assert proof, proof
    texts = ["game team player match", "stock bank money price", "computer software space science"]
    if name in ("lora", "bottleneck", "frozen", "top_k", "full"):
        here = peftkit.load(run.path, device=str(device)).predict(texts)
        there = peftkit.load(run.path, device="cpu").predict(texts)
        assert [p.label for p in here] == [p.label for p in there]
    else:
        assert peftkit.load(run.path, device=str(device)).generate(texts[:1], max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["instruction", "style"])  # a new head starts elsewhere in another dtype
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_learn_what_fp32_learns(name, dtype, materials, tmp_path, gpu):
    losses = {}
    for kind in ("float32", dtype):
        recipe = short(name, materials, tmp_path, model={"dtype": kind, "dropout": 0.0}, method={"dropout": 0.0})
        losses[kind] = peftkit.train(recipe, quiet=True).metrics["validation"]["loss"]
    assert losses[dtype] == pytest.approx(losses["float32"], rel=0.05)


def log(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd", "adafactor"])
def test_an_interrupted_run_ends_with_the_same_bytes(optimizer, materials, tmp_path, gpu):
    if "adamw_8bit" in optimizer or "paged" in optimizer:
        pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")
    training = {"optimizer": optimizer, **({"learning_rate": 1e-2})}
    recipe = short("style", materials, tmp_path, training=training, export={"prove": False})
    expected = whole(peftkit.train(recipe, quiet=True))
    with pytest.raises(Interrupted):
        peftkit.train(replace(recipe, training={"max_time": 1e-6}), quiet=True)
    assert whole(peftkit.train(recipe, resume=True, quiet=True)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "style", "instruction", "nf4", "top_k"])
def test_an_interrupted_recipe_ends_with_the_same_bytes(name, materials, tmp_path, gpu):
    recipe = short(name, materials, tmp_path, export={"prove": False})
    expected = whole(peftkit.train(recipe, quiet=True))
    with pytest.raises(Interrupted):
        peftkit.train(replace(recipe, training={"max_time": 1e-6}), quiet=True)
    assert whole(peftkit.train(recipe, resume=True, quiet=True)) == expected


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_micro_batch(materials, tmp_path, gpu):
    from tests import tiny

    base = tiny.tiny_llama(tmp_path / "wide", hidden_size=512, intermediate_size=2048, num_hidden_layers=4,
                           initializer_range=0.02)  # fmt: skip
    recipe = short(
        "instruction", materials, tmp_path, model={"source": str(base)}, export={"prove": False},
        training={"micro_batch": "auto", "batch_size": 32, "epochs": 1, "max_steps": 1, "max_grad_norm": None},
        task={"packing": False}, method={"dropout": 0.0}, evaluation={"generation": {"samples": 0}},
    )  # fmt: skip
    release_memory()
    free = peftkit.train(recipe, quiet=True)
    peak = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    release_memory()
    torch.cuda.set_per_process_memory_fraction(max(0.45 * peak, 120e6) / total)
    try:
        tight = peftkit.train(recipe, quiet=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("out of memory" in json.dumps(line) for line in log(tight))
    assert tight.metrics["training"]["micro_batch"] < 32
    assert relative(vector(tight), vector(free)) < 1e-3


def release_memory():
    import gc

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.slow
def test_one_process_under_nccl_gives_the_same_run(materials, tmp_path, gpu):
    recipe = short("lora", materials, tmp_path, export={"prove": False})
    alone = peftkit.train(recipe, quiet=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(replace(recipe, output_dir=str(tmp_path / "nccl")).to_yaml(), encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "peftkit",
        "train", str(path),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=180, env={**os.environ, "NCCL_DEBUG": "VERSION"},
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    adapter = next((tmp_path / "nccl").rglob("adapter_model.safetensors"))
    other = torch.cat([tensor.flatten().double() for tensor in load_file(adapter).values()])
    assert relative(other, vector(alone)) < 1e-5
    assert "NCCL" in done.stdout + done.stderr
