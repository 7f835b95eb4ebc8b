"""Every notebook runs from top to bottom, offline and on few rows, and is committed as it ran."""

from __future__ import annotations

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def images(notebook):
    return [
        output["data"]["image/png"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_offline_on_few_rows(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_NOTEBOOK_ROWS", "40")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    runs = [folder for folder in (tmp_path / "runs").iterdir() if (folder / "metrics.json").is_file()]
    assert len(runs) == 2
    for run in runs:
        assert 0 <= json.loads((run / "metrics.json").read_text())["test"]["accuracy"] <= 1
    assert len(images(notebook)) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_what_it_printed_and_no_path_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(images(notebook)) >= 2
    printed = json.dumps([cell.outputs for cell in code])
    assert "Traceback" not in printed
    assert not [prefix for prefix in ("/root/", "/home/", "/tmp/", "/Users/", "/work/") if prefix in printed]
