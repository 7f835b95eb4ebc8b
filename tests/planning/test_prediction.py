"""What was planned, beside what a run measured: in its folder, its metrics and its report."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from peftkit import replace
from peftkit.models import dtypes
from peftkit.planning import machine as machines
from peftkit.planning import plan as planning
from peftkit.planning import prediction
from peftkit.planning.devices import parse_device
from peftkit.planning.machine import Machine
from peftkit.planning.plan import make_plan
from peftkit.run import train
from tests.planning.test_plan import known_of

MACHINE = Machine(100_000_000, 1.0, 1e11, 1e10, 1e-6)


@pytest.fixture
def measured(monkeypatch):
    """The machine's figures are there."""
    monkeypatch.setattr(planning.machines, "is_measured", lambda threads, decoder: True)
    monkeypatch.setattr(planning.machines, "measure", lambda threads, decoder: MACHINE)


def test_measurements_of_another_processor_are_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    result = json.dumps(asdict(MACHINE))
    calls = []
    monkeypatch.setattr(
        machines.subprocess, "run", lambda *_, **__: calls.append(1) or SimpleNamespace(returncode=0, stdout=result)
    )
    for flags in ({"avx2"}, {"avx2"}, {"avx2", "avx512_bf16"}):
        monkeypatch.setattr(dtypes, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert machines.measure(1, decoder=False) == MACHINE
    assert len(calls) == 2
    assert machines.is_measured(1, decoder=False)
    assert not machines.is_measured(1, decoder=True)


def test_planned_and_measured_stand_side_by_side(small_recipe, measured):
    recipe = replace(small_recipe, training={"micro_batch": 4, "epochs": 1})
    run = train(recipe, quiet=True)
    made = json.loads((run.path / prediction.FILE).read_text())
    training = run.metrics["training"]
    memory, time = made["beside"]
    assert memory["measured"] == training["peak_memory_bytes"]
    assert time["measured"] == training["seconds"]
    assert memory["off"] == pytest.approx(memory["planned"] / memory["measured"] - 1)
    assert (training["planned_peak_memory_bytes"], training["planned_seconds"]) == (memory["planned"], time["planned"])
    alone = make_plan(recipe, parse_device("1GB"), known_of(recipe)).to_json()
    for part in ("parameters", "steps", "largest_pass", "flops_a_token"):
        assert made["plan"][part] == alone[part], part
    assert made["plan"]["steps"] == training["steps"]
    page = (run.path / "report.html").read_text()
    assert "Planned and measured" in page
    assert f"{100 * memory['off']:+.1f}%" in page


def test_a_run_does_not_wait_for_a_machine_to_be_measured_and_is_not_lost_by_its_plan(
    small_recipe, measured, monkeypatch
):
    monkeypatch.setattr(planning.machines, "is_measured", lambda threads, decoder: False)
    asked = []
    monkeypatch.setattr(planning.machines, "measure", lambda threads, decoder: asked.append(threads) or MACHINE)
    recipe = replace(small_recipe, training={"max_steps": 1})
    run = train(recipe, quiet=True)
    assert "peftkit plan" in json.loads((run.path / prediction.FILE).read_text())["reason"]
    assert "planned_seconds" not in run.metrics["training"]
    assert not asked
    known = known_of(recipe)
    found = {"seconds": 600.0, "peak_memory_bytes": 1, "micro_batch": None}
    arguments = (recipe, known.info, known.tokenizer, known.encoded, found)

    def broken(*_):
        raise NotImplementedError("no shape for this")

    import torch

    assert "peftkit plan" in prediction.compare_with_measured(*arguments, device=torch.device("cpu"))["reason"]
    assert not asked, "not even by a long run"
    monkeypatch.setattr(planning.machines, "is_measured", lambda threads, decoder: True)
    assert prediction.compare_with_measured(*arguments, device=torch.device("cpu"))["beside"][0]["measured"] == 1
    monkeypatch.setattr("peftkit.planning.plan.plan_workload", broken)
    assert "no shape for this" in prediction.compare_with_measured(*arguments, device=torch.device("cpu"))["reason"]
