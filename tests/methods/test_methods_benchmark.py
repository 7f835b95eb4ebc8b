"""The table of all methods on one task: which they are, and rows kept, missing or failed; nothing is trained."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from peftkit.experiments import jobs
from peftkit.schema.registries import METHODS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DONE = {
    "status": "done", "accuracy": 0.9, "low": 0.88, "high": 0.92, "trained_parameters": 1234,
    "peak_memory_bytes": 2 * 10**9, "seconds": 61.4, "process_seconds": 80.0, "saved_bytes": 5000,
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The script, with its results elsewhere."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import methods_table

    monkeypatch.setattr(methods_table, "RESULTS", tmp_path)
    monkeypatch.setattr(methods_table, "machine", lambda: {})
    return methods_table


def arguments(*given):
    return argparse.Namespace(data="rows", rows=None, epochs=1.0, overrides=list(given))


def call(bench, monkeypatch, *given):
    monkeypatch.setattr("sys.argv", ["methods_table.py", "--data", "rows", *given])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    return ended.value.code


def test_every_kind_of_method_is_in_it_and_learns_at_its_own_rate(bench):
    made = [bench._recipe(name, arguments("training.threads=1")) for name in bench.VARIANTS]
    assert {recipe.method.kind for recipe in made} == set(METHODS.names())
    assert all(recipe.learning_rate == recipe.method.default_learning_rate for recipe in made)
    assert all(recipe.training.threads == 1 for recipe in made)
    assert {recipe.quantization and recipe.quantization.kind for recipe in made} == {None, "nf4", "int8"}
    plain = next(recipe for name, recipe in zip(bench.VARIANTS, made) if name == "lora")
    assert plain.method == METHODS.get("lora")()


def test_a_row_is_kept_and_a_failure_told(bench, monkeypatch, tmp_path):
    trained = []

    def row(name, *_):
        trained.append(name)
        return DONE if name == "lora" else {"status": "failed", "said": "no | memory"}

    monkeypatch.setattr(bench, "_row", row)
    assert call(bench, monkeypatch, "--only", "lora", "bitfit") == 1
    assert trained == ["lora", "bitfit"]
    table = (tmp_path / "methods_ag_news.md").read_text().splitlines()
    assert table[3] == "| lora | 0.9000 [0.8800, 0.9200] | 1,234 | 2.0 GB | 61 s | 80 s | 5.0 kB |"
    assert table[2].startswith("| bitfit | failed: no")
    assert call(bench, monkeypatch, "--only", "lora", "bitfit", "--resume-partial") == 1
    assert trained == ["lora", "bitfit", "bitfit"]
    assert set(json.loads((tmp_path / "methods_ag_news.json").read_text())["methods"]) == {"lora", "bitfit"}


def test_rows_of_other_work_are_not_mixed_in(bench, monkeypatch):
    monkeypatch.setattr(bench, "_row", lambda *_: DONE)
    assert call(bench, monkeypatch, "--only", "lora") == 0
    assert "other work" in call(bench, monkeypatch, "--only", "lora", "--epochs", "2")
    assert call(bench, monkeypatch, "--only", "lorra") == 2


def test_a_run_that_breaks_off_is_a_row(bench, monkeypatch, tmp_path):
    failed = jobs.Outcome(jobs.FAILED, message="the process was killed by signal 9")
    monkeypatch.setattr(jobs, "SubprocessRunner", lambda: SimpleNamespace(run=lambda job: failed))
    assert bench._row("lora", arguments(), tmp_path) == {"status": "failed", "said": failed.message}
    wrong = bench._row("lora", arguments("training.epoch=1"), tmp_path)
    assert "did you mean 'epochs'" in wrong["said"]
