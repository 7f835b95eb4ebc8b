"""``peftkit plan`` as it is typed: --table, --gpu, --apply."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from peftkit import Recipe
from peftkit.cli import app
from peftkit.planning import plan as planning
from peftkit.planning.devices import format_bytes
from peftkit.planning.machine import CUDA_BYTES, Machine
from peftkit.planning.table import PRECISIONS, Cell
from peftkit.schema import overrides

MACHINE = Machine(100_000_000, 1.0, 1e11, 1e10, 1e-6)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs ``peftkit …`` in this process on a machine that is measured; gives exit code, stdout and stderr."""
    monkeypatch.setattr(planning.machines, "measure", lambda threads, decoder: MACHINE)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["peftkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture
def file(small_recipe, tmp_path):
    """A recipe's file, whose passes hold 32 rows."""
    path = tmp_path / "mine.yaml"
    recipe = overrides.apply(small_recipe, ["training.batch_size=32", "training.micro_batch_tokens=100000"])
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return path


@pytest.mark.slow
def test_apply_writes_the_recipe_that_was_planned(call, file, tmp_path):
    code, out, _ = call("plan", file, "--gpu", "1GB", "--json")
    whole = json.loads(out)
    assert code == 0
    assert whole["device"]["gpu"] is True
    assert whole["fits"] is True
    short = f"{whole['peak']['bytes'] / 2**20 - 0.05:.3f}MiB"
    written = tmp_path / "fits.yaml"
    code, out, _ = call("plan", file, "--gpu", short, "--json", "--apply", written)
    planned = json.loads(out)
    assert code == 0
    assert planned["fits"] is False
    assert planned["suggestion"]["changes"]
    assert Recipe.from_yaml(written) == overrides.apply(Recipe.from_yaml(file), planned["suggestion"]["changes"])
    code, out, _ = call("plan", written, "--gpu", short, "--json")
    again = json.loads(out)
    assert again["fits"] is True
    assert again["peak"]["bytes"] == planned["suggestion"]["peak_bytes"]


@pytest.mark.slow
def test_the_table_has_every_method_in_every_precision(call, bert, monkeypatch):
    methods = ["full", "ia3", "lora"]
    monkeypatch.setattr("peftkit.planning.table.METHODS", SimpleNamespace(names=lambda: methods))
    code, out, _ = call("plan", "--table", bert, "--gpu", "8GB", "--json")
    assert code == 0
    cells = {(cell["method"], cell["precision"]): cell for cell in json.loads(out)}
    assert list(cells) == [(method, precision) for method in methods for precision in PRECISIONS]
    lora, full = cells["lora", "bf16"], cells["full", "bf16"]
    assert 0 < cells["ia3", "bf16"]["trained"] < lora["trained"] < full["trained"]
    assert 0 < lora["peak"] < full["peak"]
    assert cells["full", "nf4"]["reason"], "quantized weights are not trained"
    cell = cells["lora", "nf4"]
    monkeypatch.setattr("peftkit.reporting.planning.methods_table", lambda *_: [Cell(**one) for one in cells.values()])
    code, out, _ = call("plan", "--table", bert, "--gpu", "8GB")
    assert format_bytes(cell["peak"]) in out
    assert f"{lora['trained']:,}" in out


def test_what_is_wrong_is_one_message(call, file):
    code, _, err = call("plan", file, "--gpu", "rtx4900")
    assert (code, "did you mean 'rtx4090'" in err) == (2, True)
    code, _, err = call("plan")
    assert (code, "--table" in err) == (2, True)


@pytest.mark.slow
def test_what_nothing_makes_fit_is_not_written(call, file, tmp_path):
    code, _, err = call("plan", file, "--gpu", "1MB", "--apply", tmp_path / "never.yaml")
    assert (code, "does not fit GPU of 1MB with any known change" in err) == (2, True)
    assert not (tmp_path / "never.yaml").exists()


def test_a_plan_for_a_gpu_measures_nothing_of_the_cpu(call, file, monkeypatch):
    monkeypatch.setattr(planning.machines, "measure", lambda threads, decoder: pytest.fail("the CPU was measured"))
    code, out, _ = call("plan", file, "--gpu", "8GB", "--json")
    assert code == 0
    parts = json.loads(out)["phases"][0]["parts"]
    if not torch.cuda.is_available():
        assert parts["framework"] == CUDA_BYTES
