"""Parameters in pieces on two processes (FSDP2 on a CPU mesh): trained, saved whole, and gone on with elsewhere.

Accelerate turns FSDP on only where there is a GPU, so its ``prepare`` is stood in for by torch's own ``fully_shard``,
wrapped as Accelerate's policy would wrap it: every block of the model, and then the whole.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from peftkit import replace
from tests.faults import runs


def shard(self, module, optimizer):
    """``Accelerator.prepare`` under FSDP2: in place, with the optimizer told of the new parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    before = dict(module.named_parameters())
    mesh = init_device_mesh("cpu", (self.num_processes,))
    for block in module.modules():
        if type(block).__name__ in module._no_split_modules:
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    after = {before[name]: parameter for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [after[parameter] for parameter in group["params"]]
    return module, optimizer


def work_of(recipe, *, resume=False, stop=None):
    """The work of a rank whose model is sharded; ``stop`` is the step after which it is asked to end."""
    from peftkit.training.interruptions import StopRequest

    train = runs.train(recipe, resume=resume)

    def work(rank):
        from accelerate import Accelerator

        from peftkit.training.step import Stepper

        Accelerator.prepare = shard
        Accelerator.is_fsdp2 = property(lambda self: True)
        real, done = Stepper.run, [0]

        def run(self, batch, step):
            found = real(self, batch, step)
            done[0] = step + 1
            assert any(hasattr(parameter, "full_tensor") for parameter in self.module.parameters())
            return found

        Stepper.run = run
        if stop is not None:
            StopRequest.code = property(lambda self: 15 if done[0] >= stop else 0)
        train()

    return work


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    runs.warm_up()
    return tmp_path_factory.mktemp("sharded")


def losses(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_sharded_over_two_processes_learns_saves_and_goes_on_as_one_process_does(folder, kind):
    make = runs.KINDS[kind]
    recipe = replace(make(folder), model={"dropout": 0.0}, method={"dropout": 0.0})
    one, two = (replace(recipe, output_dir=str(folder / f"{kind}-{name}")) for name in ("one", "two"))
    said = folder / f"{kind}.txt"
    assert runs.run(one, said=said) == 0, said.read_text()[-2000:]
    codes = runs.wait_all(runs.fork_ranks(work_of(two, stop=5), said))
    assert codes == [143, 143], said.read_text()[-3000:]
    stopped = runs.folder_of(two)
    (saved,) = (stopped / "checkpoints").glob("step-*5")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(saved / "model.safetensors").items()}
    codes = runs.wait_all(runs.fork_ranks(work_of(two, resume=True), said))
    assert codes == [0, 0], said.read_text()[-3000:]
    first, second = runs.folder_of(one), runs.folder_of(two)
    whole = load_file(next((first / "checkpoints").glob("step-*")) / "model.safetensors")
    assert shapes == {name: tuple(tensor.shape) for name, tensor in whole.items()}, "whole tensors, not pieces"
    assert losses(second) == pytest.approx(losses(first), rel=1e-3)
    assert "no_gradient" not in (second / "metrics.jsonl").read_text(), "a gradient may be zero in one of the shards"
    name = "adapter/adapter_model.safetensors"
    ours, theirs = load_file(second / name), load_file(first / name)
    assert set(ours) == set(theirs)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-2, atol=2e-4)
