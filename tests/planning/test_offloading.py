"""Plans of offloaded blocks compared with what a run brings to its device."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from peftkit import replace
from peftkit.errors import RecipeError
from peftkit.models import offload
from peftkit.models.loading import build
from peftkit.models.meta_model import build_meta_model
from peftkit.planning import plan as planning
from peftkit.planning.devices import Device, parse_device
from peftkit.planning.fitting import suggest
from peftkit.planning.memory import persistent_memory
from peftkit.planning.offloading import offloaded_blocks
from peftkit.planning.plan import make_plan
from peftkit.planning.trace import fake_tensor_mode
from peftkit.schema.head import head_of
from peftkit.schema.recipe import OffloadConfig
from peftkit.training.step import TaskModule
from tests import tiny
from tests.methods.every_method import made_batch
from tests.planning.test_plan import MACHINE, known_of


@pytest.fixture(autouse=True)
def _measured(monkeypatch):
    monkeypatch.setattr(planning.machines, "measure", lambda threads, decoder: MACHINE)


@pytest.fixture
def recipe(small_recipe, tmp_path):
    base = tiny.tiny_bert(tmp_path / "base", hidden_size=64, intermediate_size=128, num_hidden_layers=5)
    return replace(small_recipe, model={"source": str(base)})


class Counted(offload.BlockStream):
    """Counts the bytes that are read, and the most that are on the device."""

    streams: ClassVar[list[Counted]] = []

    def __init__(self, blocks, store, device):
        super().__init__(blocks, store, device)
        self.read, self.peak, real = 0, 0, store.read
        self.streams.append(self)

        def read(block, buffer):
            self.read += buffer.numel()
            self.peak = max(self.peak, sum(each.untyped_storage().nbytes() for each in self._buffers))
            real(block, buffer)

        store.read = read


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ("nf4", {"layers": -2}),
        pytest.param(None, {}, marks=pytest.mark.slow),
        pytest.param("int8", {}, marks=pytest.mark.slow),
        pytest.param(None, {"kind": "frozen"}, marks=pytest.mark.slow),
    ],
)
def test_bytes_on_the_device_and_read_are_those_of_a_run(recipe, quantization, method, monkeypatch):
    if quantization:
        pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")
    recipe = replace(recipe, quantization=quantization and {"kind": quantization}, method=method)
    known = known_of(recipe)
    with fake_tensor_mode():
        planned = build_meta_model(recipe, known.info, known.tokenizer, torch.float32)
        blocks = offloaded_blocks(planned, OffloadConfig(to="disk"))
        whole = persistent_memory(planned.model, "adamw")
        plan = persistent_memory(planned.model, "adamw", offloaded=blocks)
    monkeypatch.setattr(offload, "BlockStream", Counted)
    Counted.streams.clear()
    loaded = build(replace(recipe, model={"offload": "disk"}), known.info, known.tokenizer)
    (stream,) = Counted.streams
    batch = made_batch(known.tokenizer, "encoder")
    module = TaskModule(loaded, head_of(known.info, recipe.task)).train()
    stream.read = 0
    loss = module(batch)
    assert stream.read == blocks.forward
    loss.backward()
    for coming in stream._coming.values():
        coming.result()
    assert stream.read == blocks.forward + blocks.backward
    assert stream.peak == blocks.on_device == plan.blocks
    sizes = [weight.nbytes for block in stream._blocks for weight in block.weights]
    assert blocks.weights + blocks.constants == plan.offloaded == sum(sizes)
    assert whole.frozen + whole.constants - plan.frozen - plan.constants == sum(sizes)
    assert persistent_memory(loaded.model, "adamw").trained == plan.trained


def test_a_plan_names_what_is_elsewhere_and_the_time_to_read_it(recipe):
    known = known_of(recipe)
    whole, plan = (
        make_plan(each, parse_device("1GB"), known) for each in (recipe, replace(recipe, model={"offload": "cpu"}))
    )
    assert any("in the CPU's memory; a micro-batch reads" in note for note in plan.notes)
    phases = {phase.name: phase for phase in plan.phases}
    assert phases["forward and backward"].parts["offloaded blocks"] == plan.offloaded.on_device
    assert plan.peak.total < whole.peak.total
    assert plan.to_json()["offloaded"]["to"] == "cpu"
    assert whole.to_json()["offloaded"] is None
    micro_batches = len(plan.workload.train)
    read = micro_batches * (plan.offloaded.forward + plan.offloaded.backward) / 12e9
    assert plan.offloaded.seconds(micro_batches, 0) == (pytest.approx(read), 0.0)
    assert plan.training_seconds >= read * plan.workload.epochs
    with pytest.raises(RecipeError, match=r"model\.offload=disk"):
        make_plan(replace(recipe, model={"offload": "cpu"}), Device("CPU", 10**9, False), known)


@pytest.mark.slow
def test_slow_reading_takes_as_long_as_it_takes(recipe, monkeypatch):
    from peftkit.planning import offloading

    known = known_of(recipe)
    offloaded = replace(recipe, model={"offload": "disk"})
    fast = make_plan(offloaded, parse_device("1GB"), known)
    monkeypatch.setitem(offloading.RATES, "disk", 1e3)
    slow = make_plan(offloaded, parse_device("1GB"), known)
    reading, _ = slow.offloaded.seconds(len(slow.workload.train), 0)
    assert fast.training_seconds < slow.training_seconds == pytest.approx(reading * slow.workload.epochs)


@pytest.mark.slow
def test_it_is_suggested_where_weights_are_what_does_not_fit(recipe):
    recipe = replace(recipe, quantization={"kind": "nf4"}, data={"max_length": 8}, training={"micro_batch": 1})
    known = known_of(recipe)
    plan = make_plan(recipe, parse_device("1GB"), known)
    least = make_plan(replace(recipe, model={"offload": "cpu"}), parse_device("1GB"), known)
    assert least.peak.total < plan.peak.total
    tight = Device("tight", least.peak.total, True)
    suggestion = suggest(make_plan(recipe, tight, known), known)
    assert suggestion.changes == ("model.offload=cpu",)
