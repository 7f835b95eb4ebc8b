"""DeepSpeed's ZeRO on two processes of the CPU: trained, saved whole, gone on with exactly; refused where it cannot.

The first kind needs DeepSpeed (pip install deepspeed), and is skipped without it.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from peftkit import replace
from peftkit.distributed import sharding, zero
from peftkit.errors import RecipeError
from tests.faults import runs

ADAPTER = "adapter/adapter_model.safetensors"
installed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    runs.warm_up()
    return tmp_path_factory.mktemp("zero")


def work_of(recipe, stage, *, resume=False, stop=None):
    """The work of a rank under ZeRO, as Accelerate's launcher would set it up."""
    train = runs.train(recipe, resume=resume)

    def work(rank):
        communication = importlib.import_module("deepspeed.comm.torch")  # the attribute is torch itself

        from peftkit.training.interruptions import StopRequest
        from peftkit.training.step import Stepper

        communication.build_shm_op = lambda: None  # it would be compiled; gloo does without
        os.environ |= {
            "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "ACCELERATE_USE_CPU": "false",
        }  # fmt: skip
        real, done = Stepper.run, [0]

        def run(self, batch, step):
            found = real(self, batch, step)
            done[0] = step + 1
            assert type(self.module).__name__ == "DeepSpeedEngine"
            assert self.module.zero_optimization_stage() == stage
            return found

        configure = zero.configure

        def cut_all(accelerator, *others):
            configure(accelerator, *others)
            # DeepSpeed leaves small weights whole, and there are only small ones here
            accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

        zero.configure, Stepper.run = cut_all, run
        if stop is not None:
            StopRequest.code = property(lambda self: 15 if done[0] >= stop else 0)
        train()

    return work


def train(recipe, stage, said, **options):
    return runs.wait_all(runs.fork_ranks(work_of(recipe, stage, **options), said), limit=300)


def losses(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@installed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_it_learns_what_one_process_learns_and_goes_on_exactly(folder, kind, stage):
    """Accumulation, clipping, weight decay and a schedule are the recipe's; three labels divide by no two processes."""
    recipe = replace(
        runs.KINDS[kind](folder), model={"dropout": 0.0}, method={"dropout": 0.0},
        training={"max_grad_norm": 0.5, "weight_decay": 0.1, "warmup": 0.2},
    )  # fmt: skip
    one, whole, cut = (
        replace(recipe, output_dir=str(folder / f"{kind}-{stage}-{name}")) for name in ("one", "whole", "cut")
    )
    said = folder / f"{kind}-{stage}.txt"
    assert runs.run(one, said=said) == 0, said.read_text()[-2000:]
    assert train(whole, stage, said) == [0, 0], said.read_text()[-3000:]
    first, second = runs.folder_of(one), runs.folder_of(whole)
    assert losses(second) == pytest.approx(losses(first), rel=1e-3)
    ours, theirs = load_file(second / ADAPTER), load_file(first / ADAPTER)
    assert set(ours) == set(theirs)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-2, atol=2e-4)
    assert train(cut, stage, said, stop=5) == [143, 143], said.read_text()[-3000:]
    assert train(cut, stage, said, resume=True) == [0, 0], said.read_text()[-3000:]
    assert runs.differences(runs.folder_of(cut), second) == []


@installed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_in_bfloat16_the_fp32_weights_are_saved(folder, stage):
    recipe = replace(
        runs.decoder(folder), model={"dtype": "bfloat16"}, output_dir=str(folder / f"half-{stage}"),
        training={"learning_rate": 1e-4},
    )  # fmt: skip
    said = folder / f"half-{stage}.txt"
    assert train(recipe, stage, said) == [0, 0], said.read_text()[-3000:]
    saved = load_file(runs.folder_of(recipe) / ADAPTER)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in saved.values())


def accelerator(stage=3, **config):
    plugin = SimpleNamespace(
        zero_stage=stage, zero3_init_flag=config.pop("init", False), deepspeed_config={"zero_optimization": config}
    )
    return SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"), deepspeed_plugin=plugin)


@pytest.mark.parametrize(
    ("stage", "config", "parts", "said"),
    [
        (1, {}, {}, "ZeRO stage 1"),
        (3, {"init": True}, {}, "zero3_init_flag"),
        (3, {"offload_param": {"device": "cpu"}}, {}, "offload_param"),
        (2, {"offload_optimizer": {"device": "cpu"}}, {}, "offload_optimizer"),
        (3, {}, {"quantization": {"kind": "nf4"}}, "fsdp2_qlora.yaml"),
        (2, {}, {"training": {"optimizer": "adafactor"}}, "training.optimizer=adafactor"),
        (2, {}, {"training": {"nonfinite": "skip"}}, "training.nonfinite"),
        (2, {}, {"training": {"weight_averaging": 0.9}}, "weight_averaging"),
        (2, {}, {"training": {"micro_batch": "auto"}}, "micro_batch"),
        (2, {}, {"method": {"kind": "adalora"}}, "adalora"),
    ],
)
def test_what_zero_cannot_train_with_is_refused_before_any_work(small_recipe, stage, config, parts, said):
    none = {"offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"}}
    sharding.check(accelerator(stage=2, **none), small_recipe)
    with pytest.raises(RecipeError, match=said):
        sharding.check(accelerator(stage=stage, **config), replace(small_recipe, **parts))


def test_a_base_whose_weights_are_packed_already_is_refused(small_recipe, tmp_path):
    packed = shutil.copytree(small_recipe.model.source, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (packed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RecipeError, match="fsdp2_qlora"):
        sharding.check(accelerator(), replace(small_recipe, model={"source": str(packed)}))


def test_where_it_is_not_installed_the_line_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    zero.check_installed()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError, match="pip install 'deepspeed"):
        zero.check_installed()
