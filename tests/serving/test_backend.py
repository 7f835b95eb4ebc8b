"""Which form of a run is served: a proven export of the run as it is now, or the run itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import httpx2 as httpx
import pytest
import torch

import peftkit
from peftkit.errors import RunError
from peftkit.export import manifest, run_export
from peftkit.models import dtypes
from peftkit.serving import backend, server
from tests.serving.running import served

TEXTS = ["the team won the match", "the bank and the price of oil", "new software"]


@pytest.fixture(scope="module")
def exported(bert, topics_csv, tmp_path_factory):
    """A run with its ONNX export in its folder."""
    recipe = peftkit.Recipe.parse({
        "name": "topics", "model": {"source": str(bert), "dtype": "float32"}, "data": {"source": str(topics_csv)},
        "training": {"max_steps": 3, "threads": 1}, "evaluation": {"baselines": []}, "export": {"prove": False},
        "tracking": [], "output_dir": str(tmp_path_factory.mktemp("runs")),
    })  # fmt: skip
    run = peftkit.train(recipe, quiet=True).path
    run_export(run, run / "onnx", to_format="onnx")
    return run


@pytest.fixture
def run(exported, tmp_path, monkeypatch):
    """A copy of it, as on a processor without native bf16, and without a GPU."""
    monkeypatch.setattr(dtypes, "native_bf16", lambda device="cpu": False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return shutil.copytree(exported, tmp_path / "run")


def copied(run, name, **changes):
    """Another export of the run, as far as its metadata go."""
    folder = shutil.copytree(run / "onnx", run / name)
    manifest.write(folder, replace(manifest.read(folder), **changes))
    return folder


def test_a_proven_export_is_served_in_place_of_the_run(run):
    chosen = backend.choose(run)
    assert chosen.export.path == run / "onnx"
    assert chosen.reason.startswith(f"onnxruntime in float32 ({run / 'onnx'}, proven, same answer for ")
    assert chosen.unused == ()
    own = peftkit.load(run)
    with served(chosen.export, name="served") as (_, address):
        data = httpx.post(f"{address}/v1/classify", json={"input": TEXTS}, timeout=60).json()["data"]
        for answer, prediction in zip(data, own.predict(TEXTS)):
            assert answer["label"] == prediction.label
            assert answer["probability"] == pytest.approx(prediction.probability, abs=1e-4)
        refused = httpx.post(f"{address}/v1/embeddings", json={"input": TEXTS}, timeout=60)
        assert refused.status_code == 400
        assert "has no vectors; use the run itself" in refused.json()["error"]["message"]


def test_the_fastest_export_is_served_and_the_run_itself_where_it_is_faster(run, monkeypatch):
    faster = copied(run, "onnx-int8", dtype="int8")
    chosen = backend.choose(run)
    assert chosen.export.path == run / "onnx"
    assert "onnx-int8 is not used: it rounds" in chosen.unused[0]
    file = run / "adapter" / "recipe.yaml"
    recipe = peftkit.Recipe.from_yaml(file)
    file.write_text(peftkit.replace(recipe, export={"backends": ["onnx-int8"]}).to_yaml(), encoding="utf-8")
    assert backend.choose(run).export.path == faster
    monkeypatch.setattr(dtypes, "native_bf16", lambda device="cpu": True)
    assert backend.choose(run).export.path == faster
    shutil.rmtree(faster)
    assert backend.choose(run).export.path == run / "adapter"


@pytest.mark.parametrize(("file", "change", "reason"), [
    ("proof.json", None, "has no proof that passed"),
    ("proof.json", {"passed": False}, "has no proof that passed"),
    ("peftkit.json", {"origin": "0" * 64}, "was not written from this run's weights"),
])  # fmt: skip
def test_an_export_without_proof_or_of_another_training_is_not_served(run, file, change, reason):
    path = run / "onnx" / file
    values = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    if change is not None:
        path.write_text(json.dumps(values | change), encoding="utf-8")
    chosen = backend.choose(run)
    assert chosen.export.path == run / "adapter"
    assert chosen.reason == "torch in float32 (the run itself)"
    assert len(chosen.unused) == 1
    assert reason in chosen.unused[0]


def test_the_run_itself_is_served_where_it_is_needed(run, monkeypatch):
    chosen = backend.choose(run, needs=["--base"])
    assert (chosen.export.path, chosen.reason) == (run / "adapter", "torch in float32 (the run itself: --base)")
    assert backend.choose(run / "onnx").reason == "onnxruntime in float32 (the run itself)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.choose(run).export.path == run / "adapter"


def test_the_server_says_what_computes_and_takes_the_run_itself_if_asked_to(run, capsys, monkeypatch):
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    copied(run, "onnx-int8", dtype="int8", origin="0" * 64)
    options = {"adapters": {}, "name": "x", "host": "127.0.0.1", "port": 0, "base": False, "log_requests": False,
               "queue": 1, "batch": 1, "max_tokens": 8, "timeout": 5.0}  # fmt: skip
    server.serve(run, **options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("serving x on http://127.0.0.1:")
    assert lines[1].startswith(f"  computed by onnxruntime in float32 ({run / 'onnx'}, proven")
    assert lines[2].startswith(f"  {run / 'onnx-int8'} is not used: it rounds")
    server.serve(run, **options, backend="torch")
    assert "computed by torch in float32 (the run itself: --backend torch)" in capsys.readouterr().out


def test_a_backend_that_is_named_is_served_or_refused(run):
    chosen = backend.choose(run, wanted="onnx")
    assert chosen.export.path == run / "onnx"
    assert chosen.reason == f"onnxruntime in float32 ({run / 'onnx'}: --backend onnx)"
    assert backend.choose(run, wanted="torch").export.path == run / "adapter"
    assert backend.choose(run, wanted="auto").export.path == run / "onnx"
    with pytest.raises(RunError, match="--backend onnx serves an export, which cannot serve --base"):
        backend.choose(run, wanted="onnx", needs=["--base"])
    with pytest.raises(RunError, match=r"unknown backend 'onx'.*onnx"):
        backend.choose(run, wanted="onx")
    with pytest.raises(RunError, match=r"cannot predict with 'onnx-int8'.*format onnx-int8"):
        backend.choose(run, wanted="onnx-int8")
    with pytest.raises(RunError, match="is an export for 'onnx'"):
        backend.choose(run / "onnx", wanted="torch")
