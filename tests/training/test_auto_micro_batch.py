"""training.micro_batch=auto: found before the first step, halved when a step runs out of memory; same gradient."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from peftkit import replace
from peftkit.data.pipeline import encode, prepare
from peftkit.distributed.session import open_session
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning import machine as machines
from peftkit.run import train
from peftkit.schema.head import head_of
from peftkit.training.auto_micro_batch import AUTO, AutoStepper
from peftkit.training.step import Stepper, TaskModule
from tests.faults import runs

MESSAGE = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."


@pytest.fixture(autouse=True)
def _measured(monkeypatch):
    machine = machines.Machine(100_000_000, 1.0, 1e11, 1e10, 1e-6)
    monkeypatch.setattr("peftkit.planning.plan.machines.measure", lambda threads, decoder: machine)


class LittleMemory:
    """Memory for so many rows in a micro-batch that trains."""

    def __init__(self, rows):
        self.rows, self.seen = rows, []

    def __call__(self, module, args, kwargs):
        rows = kwargs["input_ids"].shape[0]
        self.seen.append(rows)
        if module.training and torch.is_grad_enabled() and rows > self.rows:
            raise RuntimeError(MESSAGE)


class Gradients:
    def __init__(self, module):
        self.module, self.gradients = module, {}

    def step(self):
        self.gradients = {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}

    def zero_grad(self, set_to_none=True):
        self.module.zero_grad(set_to_none=set_to_none)


def stepper_of(recipe):
    session = open_session(recipe)
    tokenizer, prepared = load_tokenizer(recipe.model), prepare(recipe)
    module = TaskModule(build(recipe, prepared.info, tokenizer, session.device), head_of(prepared.info, recipe.task))
    split = encode(prepared, tokenizer, recipe).splits["train"]
    schedule = type("None", (), {"step": lambda self: None})()
    stepper = AutoStepper if recipe.training.micro_batch == AUTO else Stepper
    return stepper(recipe, session, module, Gradients(module), schedule, split, tokenizer)


@pytest.fixture
def auto(small_recipe):
    return replace(small_recipe, method={"dropout": 0.0}, training={"micro_batch": "auto", "max_grad_norm": None})


def test_a_shortage_in_a_step_halves_and_gives_the_same_gradient(auto):
    whole = stepper_of(replace(auto, training={"micro_batch": None}))
    whole.run(np.arange(8), 0)
    short, messages = stepper_of(auto), []
    small = LittleMemory(3)
    short.report = messages.append
    short.module.model.register_forward_pre_hook(small, with_kwargs=True)
    short.run(np.arange(8), 0)
    assert small.seen == [8, 4, 2, 2, 2, 2]
    assert short.micro_batch == 2
    assert messages == [
        f"out of memory with {rows} rows: retrying with {rows // 2} rows per micro-batch; global batch unchanged"
        for rows in (8, 4)
    ]
    for name, gradient in whole.optimizer.gradients.items():
        torch.testing.assert_close(short.optimizer.gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_trial_leaves_neither_gradients_nor_random_numbers(auto):
    stepper = stepper_of(auto)
    small = LittleMemory(4)
    stepper.module.model.register_forward_pre_hook(small, with_kwargs=True)
    before = torch.get_rng_state()
    stepper.find_micro_batch()
    assert small.seen == [8, 4]
    assert stepper.micro_batch == 4
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in stepper.module.parameters())
    longest = stepper.split.lengths[stepper.largest_batch()].max()
    assert longest == stepper.split.lengths.max(), "a micro-batch of the longest rows is tried"


def test_what_cannot_be_halved_is_raised(auto):
    alone = stepper_of(auto)
    alone.module.model.register_forward_pre_hook(LittleMemory(0), with_kwargs=True)
    with pytest.raises(RuntimeError, match="can't allocate"):
        alone.find_micro_batch()
    given = stepper_of(replace(auto, training={"micro_batch": 4}))
    given.module.model.register_forward_pre_hook(LittleMemory(3), with_kwargs=True)
    with pytest.raises(RuntimeError, match="can't allocate"):
        given.run(np.arange(8), 0)


def test_a_cpu_is_asked_before_it_is_tried(auto, monkeypatch):
    from types import SimpleNamespace

    stepper = stepper_of(auto)
    sizes = iter([100, 40, 20])
    monkeypatch.setattr("peftkit.planning.plan.micro_batch_bytes", lambda *_: next(sizes))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=30))
    stepper.find_micro_batch()
    assert stepper.micro_batch == 2


def test_a_run_records_what_it_chose(auto, monkeypatch):
    small = LittleMemory(2)
    build_module = TaskModule.__init__

    def watched(self, loaded, head):
        build_module(self, loaded, head)
        loaded.model.register_forward_pre_hook(small, with_kwargs=True)

    monkeypatch.setattr(TaskModule, "__init__", watched)
    run = train(replace(auto, training={"epochs": 1}), quiet=True)
    assert run.metrics["training"]["micro_batch"] == 2
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines if "event" in line] == ["micro_batch", "micro_batch"]


def test_all_processes_take_the_fewest_rows_that_fit_anywhere(auto, tmp_path, monkeypatch):
    """Rank 1 of two has memory for two rows per micro-batch; unequal numbers would leave rank 0 waiting."""
    monkeypatch.setattr(AutoStepper, "_plan_for_cpu", lambda *_: None)

    def work(rank):
        def watched(self, loaded, head):
            build_module(self, loaded, head)
            if rank == 1:
                loaded.model.register_forward_pre_hook(LittleMemory(2), with_kwargs=True)

        build_module, TaskModule.__init__ = TaskModule.__init__, watched
        runs.train(recipe)()

    recipe = replace(auto, model={"dropout": 0.0}, training={"epochs": 1})
    said = tmp_path / "said.txt"
    assert runs.wait_all(runs.fork_ranks(work, said)) == [0, 0], said.read_text()[-2000:]
    path = runs.folder_of(recipe)
    assert json.loads((path / "metrics.json").read_text())["training"]["micro_batch"] == 2
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert ["continuing with 2 rows per micro-batch" in line["message"] for line in lines if "event" in line] == [True]
