"""Plans beside what torch, peft and the run itself say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from peftkit import Recipe, replace
from peftkit.data.pipeline import encode, prepare
from peftkit.errors import MethodError, RecipeError
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning import plan as planning
from peftkit.planning.devices import Device, parse_device
from peftkit.planning.fitting import suggest
from peftkit.planning.machine import Machine
from peftkit.planning.memory import persistent_memory, state_bytes
from peftkit.planning.plan import PlanInputs, make_plan
from peftkit.planning.trace import Tracer, fake_tensor_mode
from peftkit.reporting.planning import plan_command
from peftkit.schema import overrides
from peftkit.training.optimizer import build_optimizer
from peftkit.training.weights import TrainedWeights

MACHINE = Machine(100_000_000, 1.0, 1e11, 1e10, 1e-6)


@pytest.fixture(autouse=True)
def _measured(monkeypatch):
    """No test measures the machine."""
    monkeypatch.setattr(planning.machines, "measure", lambda threads, decoder: MACHINE)


def known_of(recipe):
    tokenizer, prepared = load_tokenizer(recipe.model), prepare(recipe)
    return PlanInputs(tokenizer, prepared.info, encode(prepared, tokenizer, recipe), MACHINE, 0, 0)


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("lora", "adamw"), ("full", "adafactor"), ("frozen", "sgd"), ({"kind": "top_k", "k": 1}, "adamw")],
)
def test_weights_gradients_and_states_are_those_of_the_real_model(small_recipe, method, optimizer):
    recipe = replace(small_recipe, method=method, training={"optimizer": optimizer})
    known = known_of(recipe)
    model = build(recipe, known.info, known.tokenizer).model
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    real = build_optimizer(model, recipe)
    real.step()
    states = [t for state in real.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    plan = make_plan(recipe, parse_device("1GB"), known)
    assert plan.persistent.trained == sum(p.numel() * 4 for p in trained)
    assert plan.persistent.states == pytest.approx(sum(t.numel() * t.element_size() for t in states), abs=16)
    whole = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert plan.persistent.frozen + plan.persistent.trained == sum(whole.values()) + buffers


def test_a_traced_product_holds_what_torch_would_hold():
    with fake_tensor_mode(), Tracer() as tracer:
        x = torch.empty(1000, 1000, requires_grad=True)
        y = (x @ x).exp()
        alive = tracer.finish().end
        y.sum().backward()
        found = tracer.finish()
    assert alive == 2 * 4_000_000, "x and exp's output, which is kept; the product itself is not"
    assert found.flops == 3 * 2 * 1000**3
    assert found.peak >= alive + 4_000_000
    assert x.grad.shape == (1000, 1000)


def test_checkpointing_longer_rows_and_smaller_passes_change_the_peak(small_recipe):
    """The mean reads every token of both blocks; of two blocks whose last reads one token, one is nearly all."""
    training = {"batch_size": 32, "micro_batch_tokens": 100_000}
    recipe = replace(small_recipe, training=training, model={"pooling": "mean"})
    known, device = known_of(recipe), parse_device("1GB")

    def peak(**training):
        plan = make_plan(replace(recipe, training=training), device, known)
        return next(phase for phase in plan.phases if phase.name == "forward and backward").total

    whole = peak()
    assert peak(gradient_checkpointing="full") < whole
    assert peak(micro_batch=4) < whole
    assert make_plan(replace(recipe, data={"max_length": 8}), device, known).peak.total < whole


@pytest.mark.slow
def test_the_fewest_changes_that_fit_and_the_recipe_they_make(small_recipe):
    recipe = replace(small_recipe, training={"batch_size": 32, "micro_batch_tokens": 100_000})
    known = known_of(recipe)
    whole = make_plan(recipe, parse_device("1GB"), known)
    assert suggest(whole, known) is None, "it fits as it is"
    tight = Device("tight", whole.peak.total - 1000, True)
    found = suggest(make_plan(recipe, tight, known), known)
    assert len(found.changes) == 1
    assert found.plan.fits
    assert found.slower > 0
    assert make_plan(overrides.apply(recipe, found.changes), tight, known).fits
    assert suggest(make_plan(recipe, Device("nothing", 1000, True), known), known) is None


def test_devices_by_name_and_size():
    assert parse_device("rtx4090").memory == 24 * 2**30
    assert parse_device("8GB").memory == 8 * 2**30
    assert parse_device("512 MiB").memory == 512 * 2**20
    with pytest.raises(RecipeError, match="did you mean 'rtx4090'"):
        parse_device("rtx4900")


def test_states_of_8_bit_adamw():
    assert state_bytes("adamw_8bit", (64, 64)) == 2 * (4096 + 4 * 16)
    assert state_bytes("adamw_8bit", (63, 64)) == 8 * 63 * 64
    assert state_bytes("adamw", (3, 5)) == 120


def test_a_decoder_is_planned_and_told_in_words(llama, tmp_path):
    rows = [{"instruction": f"say {n}", "output": "hello " * (n % 7 + 1)} for n in range(24)]
    for name in ("train", "validation", "test"):
        part = rows[:12] if name == "train" else rows[12:18] if name == "validation" else rows[18:]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    values = {"name": "words", "model": {"source": str(llama), "dtype": "bfloat16"}, "task": "instruction"}
    recipe = Recipe.parse({**values, "data": {"source": str(tmp_path)}, "training": {"threads": 1}})
    said = plan_command(recipe, table=None, gpu=None, as_json=False, apply=None)
    assert "memory by phase" in said
    assert "fits CPU" in said
    plan = make_plan(recipe, parse_device("1GB"), known_of(recipe))
    assert plan.flops_per_token > 0
    assert plan.seconds > 0
    model = build(recipe, known_of(recipe).info, load_tokenizer(recipe.model)).model
    assert persistent_memory(model, "adamw") == plan.persistent


@pytest.mark.slow
def test_packed_rows_are_planned(llama, tmp_path):
    lines = [f"the king said no to the red ball {'of the new world ' * (n % 5)}{n}" for n in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["text", *lines]), encoding="utf-8")
    values = {"name": "packed", "model": {"source": str(llama)}, "task": {"kind": "style"}}
    recipe = Recipe.parse({**values, "data": {"source": str(tmp_path / "rows.csv"), "max_length": 32}})
    known = known_of(recipe)
    assert "position_ids" in known.encoded.splits["train"].examples.column_names
    plan, loose = make_plan(recipe, parse_device("1GB"), known), replace(recipe, task={"packing": False})
    assert plan.persistent == make_plan(loose, parse_device("1GB"), known_of(loose)).persistent
    assert plan.peak.total > plan.persistent.frozen
    assert plan.flops_per_token > 0


def test_what_is_planned_as_plain_is_said_to_be(small_recipe):
    recipe = replace(small_recipe, training={"compile": True})
    plan = make_plan(recipe, parse_device("1GB"), known_of(recipe))
    assert any("not compiled" in note for note in plan.notes)
    assert plan.peak == make_plan(small_recipe, parse_device("1GB"), known_of(small_recipe)).peak


def test_a_method_that_the_base_cannot_take_is_refused_by_the_plan_too(small_recipe):
    recipe = replace(small_recipe, method={"kind": "lora", "init_lora_weights": "loftq"})
    with pytest.raises(MethodError, match=r"quantization\.kind=nf4"):
        make_plan(recipe, parse_device("1GB"), known_of(recipe))


def test_averaged_weights_are_planned_as_the_copies_that_they_are(small_recipe):
    recipe = replace(small_recipe, training={"weight_averaging": 0.9})
    loaded = build(recipe, known_of(recipe).info, load_tokenizer(recipe.model)).model
    weights = TrainedWeights(SimpleNamespace(model=loaded), recipe, SimpleNamespace(sharded=False))
    size = sum(tensor.nbytes for tensor in weights.means.values())
    plan = make_plan(recipe, parse_device("1GB"), known_of(recipe))
    assert plan.persistent.averages == size
    phases = {phase.name: phase.parts for phase in plan.phases}
    assert phases["optimizer step"]["averaged weights"] == phases["evaluation"]["copies"] == size
