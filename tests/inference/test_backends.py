"""Which runtime predicts: chosen by measurement among proven exports, the same answers, and one message where not."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import shutil
import sys
import time

import numpy as np
import pytest

import peftkit
from peftkit.cli import app
from peftkit.errors import MethodError, RecipeError, RunError
from peftkit.export.adapter import check_backends
from peftkit.export.formats import onnx
from peftkit.export.loading import load_exported
from peftkit.inference import backends
from peftkit.inference.predict_file import predict_file
from peftkit.schema.recipe import Recipe, replace
from peftkit.schema.types import TaskInfo
from peftkit.training.step import TaskModule
from tests import tiny
from tests.exporting import TEXTS, exported

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in onnx.WRITE), reason="the onnx extra is not installed"
)
LORA = {"kind": "lora", "rank": 4}


@pytest.fixture(scope="module")
def run(bert, tmp_path_factory):
    """A run's folder with its exports for ONNX Runtime, of which the recipe names both."""
    folder = tmp_path_factory.mktemp("backends") / "run"
    parts = {"prove": False, "backends": ("onnx", "onnx-int8")}
    exported(folder, bert, method=LORA, model={"pooling": "mean"}, export=parts)
    return folder


@pytest.fixture
def OnnxModel():
    """The class that runs ONNX files."""
    from peftkit.export.onnx_graph import OnnxModel

    return OnnxModel


@pytest.fixture
def small(monkeypatch):
    """A file of a few texts is worth a measurement."""
    monkeypatch.setattr(backends, "FEWEST", 4)
    monkeypatch.setattr("peftkit.inference.predict_file.FEWEST", 4)
    monkeypatch.setattr(backends, "WORTHWHILE", 0.0)


@pytest.fixture
def slow(monkeypatch):
    """Makes one of the runtimes slower than the others on any machine."""

    def slow_down(owner, unless=()):
        forward = owner.forward

        @functools.wraps(forward)
        def waiting(self, *arguments, **options):
            if not isinstance(getattr(self, "model", None), unless):
                time.sleep(0.3)
            return forward(self, *arguments, **options)

        monkeypatch.setattr(owner, "forward", waiting)

    return slow_down


def predicted(run, folder, texts=TEXTS, **options):
    """The rows that a file of the texts becomes."""
    source, out = folder / "texts.csv", folder / "out.csv"
    source.write_text("\n".join(["text", *texts]) + "\n", encoding="utf-8")
    predict_file(run, file=source, column=None, out=out, **options)
    with out.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def probabilities(rows):
    return np.array([[float(value) for name, value in row.items() if name.startswith("probab")] for row in rows])


def test_a_run_writes_what_its_recipe_names(run):
    for name, dtype in (("onnx", "float32"), ("onnx-int8", "int8")):
        proof = json.loads((run / name / "proof.json").read_text())
        assert (proof["passed"], proof["dtype"]) == (True, dtype)


@pytest.mark.parametrize(("backend", "tolerance"), [("torch", 0), ("onnx", 1e-4), ("onnx-int8", 0.05)])
def test_a_named_backend_predicts_and_the_file_names_it(run, OnnxModel, tmp_path, backend, tolerance, capsys):
    rows = predicted(run, tmp_path, backend=backend)
    assert {row["backend"] for row in rows} == {backend}
    expected = probabilities(predicted(run, tmp_path, backend="torch"))
    difference = np.abs(probabilities(rows) - expected).max()
    assert difference <= tolerance
    assert (difference > 0) == (backend != "torch")
    model = peftkit.load(run, backend=backend)
    assert isinstance(model.model, OnnxModel) == (backend != "torch")
    assert capsys.readouterr().err == ""


def test_auto_takes_what_is_fastest_here_and_prints_the_rates(run, OnnxModel, small, slow, tmp_path, capsys):
    slow(TaskModule, unless=OnnxModel)
    (name,) = {row["backend"] for row in predicted(run, tmp_path)}
    assert name in ("onnx", "onnx-int8")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"predicting with {name}: texts/s on the first {len(TEXTS)}: torch " in printed
    assert ", onnx " in printed
    assert ", onnx-int8 " in printed


def test_auto_stays_with_torch_where_that_is_fastest(run, OnnxModel, small, slow, tmp_path, capsys):
    slow(OnnxModel)
    assert {row["backend"] for row in predicted(run, tmp_path)} == {"torch"}
    assert "predicting with torch: texts/s on the first" in capsys.readouterr().err


def test_a_loaded_run_chooses_once_and_goes_back_to_torch_without_its_adapter(run, OnnxModel, small, slow):
    slow(TaskModule, unless=OnnxModel)
    torchs = peftkit.load(run, backend="torch")
    model = peftkit.load(run)
    assert model.predict(TEXTS[:3])  # too few to choose
    assert (model.backend.name, model.backend.pending) == ("torch", True)
    model.use_backend("onnx")
    np.testing.assert_allclose(model.logits(TEXTS), torchs.logits(TEXTS), rtol=1e-3, atol=1e-4)
    assert (model.backend.name, model.backend.pending) == ("onnx", False)
    with model.base():
        off = model.logits(TEXTS)
    assert model.backend.name == "torch"
    assert np.abs(off - torchs.logits(TEXTS)).max() > 1e-3


def test_nothing_is_measured_on_few_texts_in_a_pipe_or_unmerged(run, small, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "fastest", lambda *_, **__: pytest.fail("measured"))
    assert {row["backend"] for row in predicted(run, tmp_path, merge=False)} == {"torch"}
    monkeypatch.setattr(sys, "stdin", iter([f"{text}\n" for text in TEXTS]))
    assert predict_file(run, file=None, column=None, out=tmp_path / "pipe.jsonl") == len(TEXTS)
    monkeypatch.undo()
    monkeypatch.setattr(backends, "fastest", lambda *_, **__: pytest.fail("measured"))
    assert {row["backend"] for row in predicted(run, tmp_path)} == {"torch"}


def test_work_of_a_moment_is_not_worth_the_others_but_stays_open(run, monkeypatch):
    monkeypatch.setattr(backends, "FEWEST", 4)
    monkeypatch.setattr(backends, "fastest", lambda *_, **__: pytest.fail("measured"))
    model = peftkit.load(run)
    for _ in range(2):
        model.predict(TEXTS)
        assert (model.backend.name, model.backend.pending) == ("torch", True)
        monkeypatch.setattr(backends, "seconds_of", lambda *_: pytest.fail("estimated again"))
    assert f"{len(TEXTS)} texts take about " in model.backend.reason
    monkeypatch.undo()
    monkeypatch.setattr(backends, "fastest", lambda *_: ("onnx", "many"))
    rows = model.input_rows(TEXTS)
    assert model.choose_backend(rows, total=10**9).name == "onnx"


def test_one_that_rounds_is_taken_only_where_the_recipe_names_it(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    recipe = Recipe.from_yaml(copy / "adapter" / "recipe.yaml")
    for named, expected in ((("onnx-int8",), {"onnx", "onnx-int8"}), ((), {"onnx"})):
        text = replace(recipe, export={"backends": named}).to_yaml()
        (copy / "adapter" / "recipe.yaml").write_text(text, encoding="utf-8")
        usable, problems = backends.candidates(load_exported(copy), half_precision=False)
        assert (set(usable), problems) == (expected, [])
    assert usable["onnx"].tolerance == pytest.approx(1e-3)
    assert predicted(copy, tmp_path, backend="onnx-int8")[0]["backend"] == "onnx-int8"


def test_other_answers_than_torchs_are_left_out(run, OnnxModel, small, slow, tmp_path, capsys, monkeypatch):
    slow(TaskModule, unless=OnnxModel)
    forward = OnnxModel.forward

    def wrong(self, *arguments, **options):
        outputs = forward(self, *arguments, **options)
        outputs.logits[:, 0] += 1
        return outputs

    monkeypatch.setattr(OnnxModel, "forward", functools.wraps(forward)(wrong))
    assert {row["backend"] for row in predicted(run, tmp_path)} == {"torch"}
    assert "onnx differs from torch by " in capsys.readouterr().err


def test_an_export_of_other_weights_or_without_proof_is_not_used(run, small, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("onnx-int8"))
    weights = copy / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + b"\0\0\0\0")
    with pytest.raises(RunError, match=r"onnx was not written from this run's weights; remove it and run `peftkit ex"):
        peftkit.load(copy, backend="onnx")
    assert {row["backend"] for row in predicted(copy, tmp_path)} == {"torch"}
    assert "predicting with torch: onnx was not written from this run's weights" in capsys.readouterr().err
    weights.write_bytes(before)
    peftkit.load(copy, backend="onnx")
    (copy / "onnx" / "proof.json").unlink()
    with pytest.raises(RunError, match="onnx has no proof that passed"):
        peftkit.load(copy, backend="onnx")


def test_what_cannot_be_is_one_message_with_the_command(run, bert, tmp_path):
    bare = shutil.copytree(run / "adapter", tmp_path / "run" / "adapter").parent
    command = rf"run `peftkit export {bare} --to {bare}/onnx --format onnx` first"
    with pytest.raises(RunError, match=command):
        predicted(bare, tmp_path, backend="onnx")
    shutil.copytree(run / "onnx", bare / "onnx")
    assert predicted(bare, tmp_path, backend="onnx")[0]["backend"] == "onnx"
    with pytest.raises(RunError, match=r"unknown backend 'onx': did you mean 'onnx'"):
        peftkit.load(run, backend="onx")
    with pytest.raises(RunError, match="has its adapter merged"):
        peftkit.load(run, backend="onnx", merge=False)
    with pytest.raises(RunError, match="is an export for 'onnx'; to predict with 'torch', name the run"):
        peftkit.load(run / "onnx", backend="torch")
    with pytest.raises(RecipeError, match=r"export\.backends.*unknown backend 'gguf'"):
        tiny.tiny_recipe(bert, export={"backends": ["gguf"]})


def test_evaluate_scores_what_a_backend_predicts(run, tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.csv"
    labels = ("cat", "dog", "eel")
    rows = [f"{text},{labels[number % 3]}" for number, text in enumerate(TEXTS)]
    file.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    expected = peftkit.evaluate(run, file=file)
    assert peftkit.evaluate(run, file=file, backend="onnx")["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert peftkit.evaluate(run / "onnx", file=file)["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    arguments = ["evaluate", run, "--file", file, "--json", "--backend", "onnx-int8"]
    monkeypatch.setattr(sys, "argv", ["peftkit", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    rounded = json.loads(capsys.readouterr().out)["loss"]
    assert 0 < abs(rounded - expected["loss"]) < 0.1


def test_a_recipe_whose_backends_do_not_fit_is_refused_before_training(llama, bert, tmp_path, monkeypatch):
    from peftkit.models.loading import build
    from peftkit.models.tokenizer import load_tokenizer

    recipe = tiny.tiny_recipe(llama, method=LORA, task={"kind": "style"}, export={"backends": ["onnx"]})
    loaded = build(recipe, TaskInfo("causal_lm"), load_tokenizer(recipe.model))
    with pytest.raises(MethodError, match=r"export\.backends: onnx: ONNX is not written for task.kind=style"):
        check_backends(tmp_path, loaded, recipe, TaskInfo("causal_lm"))
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"the {word} is here,{n % 2}\n" for n, word in enumerate(tiny.WORDS)))
    values = {"data": {"source": str(file)}, "export": {"backends": ["onnx"]}, "output_dir": str(tmp_path / "runs")}
    monkeypatch.setattr(onnx, "WRITE", ("onnx_that_is_not_there",))
    with pytest.raises(peftkit.UserError, match="pip install onnx_that_is_not_there"):
        peftkit.train(tiny.tiny_recipe(bert, **values), quiet=True)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())
