"""Formats are found in the registry; one of another package is proven, loaded and described like our own."""

from __future__ import annotations

import json

import numpy as np
import pytest

import peftkit
from peftkit.errors import ExportError, MethodError, RecipeError, RunError
from peftkit.export import loading, manifest, run_export
from peftkit.schema.registries import EXPORTERS
from peftkit.schema.types import TaskInfo
from tests.export.demo_format import Demo
from tests.exporting import TEXTS, exported


@pytest.fixture
def demo(monkeypatch):
    assert "peft" in EXPORTERS
    monkeypatch.setitem(EXPORTERS._items, "demo", Demo)


@pytest.mark.parametrize("pooling", ["own", "mean"])
def test_another_package_s_format_is_proven_by_its_own_loader_and_loads(demo, bert, tmp_path, pooling):
    folder, _ = exported(tmp_path / "run", bert, model={"pooling": pooling}, export={"prove": False})
    assert "0.001 allowed" in run_export(folder, tmp_path / "demo", to_format="demo")
    proof = json.loads((tmp_path / "demo" / "proof.json").read_text())
    assert proof["passed"]
    assert proof["relative"] < 1e-5
    assert set(proof["versions"]) == {"torch", "transformers", "peft"}
    card = (tmp_path / "demo" / "README.md").read_text()
    assert "peftkit.load(" in card
    assert "library_name: peftkit\n" in card
    ours = peftkit.load(tmp_path / "demo")
    assert ours.manifest.saves == "demo"
    np.testing.assert_allclose(ours.logits(TEXTS), peftkit.load(folder).logits(TEXTS), rtol=1e-4, atol=1e-5)


def test_options_of_a_format_are_checked_and_a_failed_proof_leaves_nothing(demo, bert, llama, tmp_path):
    folder, _ = exported(tmp_path / "run", bert, export={"prove": False})
    with pytest.raises(ExportError, match=r"export format 'demo': its logits differ .* export.tolerance allows 0.001"):
        run_export(folder, tmp_path / "demo", to_format="demo", scale=1.5)
    assert not (tmp_path / "demo").exists()
    with pytest.raises(RecipeError, match=r"export format 'demo': unknown field 'scal': did you mean 'scale'"):
        run_export(folder, tmp_path / "demo", to_format="demo", scal=1.5)
    with pytest.raises(RecipeError, match="unknown field 'merge'"):
        run_export(folder, tmp_path / "demo", to_format="demo", merge=True)
    with pytest.raises(RecipeError, match="unknown export format 'dmo': did you mean 'demo'"):
        run_export(folder, tmp_path / "demo", to_format="dmo")
    causal, _ = exported(tmp_path / "a", llama, TaskInfo("causal_lm"), task={"kind": "style"}, export={"prove": False})
    with pytest.raises(MethodError, match="demo is for classifiers"):
        run_export(causal, tmp_path / "demo", to_format="demo")


def test_a_folder_of_a_format_that_is_not_installed_is_refused(demo, bert, tmp_path, monkeypatch):
    folder, _ = exported(tmp_path / "run", bert, export={"prove": False})
    run_export(folder, tmp_path / "demo", to_format="demo")
    monkeypatch.delitem(EXPORTERS._items, "demo")
    with pytest.raises(RunError, match=r"not as peftkit writes it: saves: unknown export format 'demo'"):
        peftkit.load(tmp_path / "demo")


def test_merged_is_a_format_like_any_other(bert, tmp_path):
    folder, _ = exported(tmp_path / "run", bert, export={"prove": False})
    run_export(folder, tmp_path / "one", merge=True)
    run_export(folder, tmp_path / "two", to_format="merged")
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


def test_peftkit_json_is_read_once_per_load(bert, tmp_path, monkeypatch):
    folder, _ = exported(tmp_path / "run", bert, export={"prove": False})
    reads, read = [], manifest.read
    monkeypatch.setattr(manifest, "read", lambda folder: (reads.append(folder), read(folder))[1])
    run = peftkit.load(folder)
    run.predict(TEXTS)
    run.unmerge()
    assert reads == [folder]
    loading.load_exported(folder)
    assert reads == [folder] * 2
