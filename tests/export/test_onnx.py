"""A run as an ONNX file: ONNX Runtime gives torch's predictions on rows and lengths that were never traced."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import peftkit
from peftkit.errors import ExportError, MethodError, ModelError
from peftkit.export import onnx_int8, run_export
from peftkit.export.formats import onnx
from peftkit.schema.types import TaskInfo
from tests import tiny
from tests.exporting import TEXTS, exported

LORA = {"kind": "lora", "rank": 4}
PLAIN = {"prove": False}


def installed():
    """The class that runs ONNX files; skips the test where packages are missing."""
    for name in onnx.WRITE:
        pytest.importorskip(name)
    from peftkit.export.onnx_graph import OnnxModel

    return OnnxModel


@pytest.fixture(scope="module")
def classifier(bert, tmp_path_factory):
    """Folders of a trained LoRA classifier, its ONNX export and that in INT8; what the INT8 export printed."""
    installed()
    folder = tmp_path_factory.mktemp("classifier")
    logged = logging.Handler()
    logged.emit = lambda record: pytest.fail(f"logged by {record.name}: {record.getMessage()}")
    logged.addFilter(lambda record: record.name == "root")  # where onnxruntime's quantizer gives advice
    logging.getLogger().addHandler(logged)
    run, _ = exported(folder / "run", bert, method=LORA, model={"pooling": "mean"}, export=PLAIN)
    run_export(run, folder / "onnx", to_format="onnx")
    message = run_export(run, folder / "int8", to_format="onnx-int8")
    logging.getLogger().removeHandler(logged)
    return run, folder / "onnx", folder / "int8", message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("maker", "pooling", "method"),
    [(tiny.tiny_bert, "own", LORA),
     pytest.param(tiny.tiny_bert, "mean", {"kind": "frozen"}, marks=pytest.mark.slow),
     pytest.param(tiny.tiny_distilbert, "cls", LORA, marks=pytest.mark.slow),
     pytest.param(tiny.tiny_roberta, "own", {"kind": "top_k", "k": 1}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_runtime_predicts_what_torch_predicts(maker, pooling, method, tmp_path):
    OnnxModel = installed()
    folder, _ = exported(
        tmp_path / "run", maker(tmp_path / "base"), method=method, model={"pooling": pooling}, export=PLAIN
    )
    said = run_export(folder, tmp_path / "onnx", to_format="onnx")
    assert "(format onnx); its logits differ from the trained model's by " in said
    ours, torchs = peftkit.load(tmp_path / "onnx"), peftkit.load(folder)
    assert type(ours.model) is OnnxModel
    expected = torchs.logits(TEXTS)
    np.testing.assert_allclose(ours.logits(TEXTS), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert [p.label for p in ours.predict(TEXTS)] == [p.label for p in torchs.predict(TEXTS)]
    assert json.loads((tmp_path / "onnx" / "proof.json").read_text())["passed"]


@pytest.mark.parametrize("pooling", ["mean", pytest.param("cls", marks=pytest.mark.slow)])
def test_its_vectors_are_those_of_torch_and_of_sentence_transformers(bert, pooling, tmp_path, capsys):
    installed()
    run, _ = exported(
        tmp_path / "run", bert, TaskInfo("scored_pairs"), method=LORA, model={"pooling": pooling}, export=PLAIN,
        task={"kind": "similarity"}, data={"text_pair": "other", "max_length": 32},
    )  # fmt: skip
    home = run.parent
    for name in ("onnx", "onnx-int8"):
        run_export(run, home / name, to_format=name)
    torchs, ours = peftkit.load(run, backend="torch"), peftkit.load(home / "onnx")
    expected = torchs.embed(TEXTS)
    np.testing.assert_allclose(ours.embed(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(peftkit.load(run, backend="onnx").embed(TEXTS), expected, atol=1e-5)
    units = ours.embed(TEXTS, normalize=True)
    np.testing.assert_allclose(SentenceTransformer(str(run)).encode(TEXTS), units, atol=1e-5)
    chosen = peftkit.load(run, backend="torch")
    chosen.use_backend("onnx")
    chosen.loaded.model = None  # so that nothing else can have computed them
    np.testing.assert_allclose(chosen.embed(TEXTS), expected, atol=1e-5)
    pairs = list(zip(TEXTS, TEXTS[::-1]))
    cosines = [one.label for one in torchs.predict(pairs)]
    assert [one.label for one in ours.predict(pairs)] == pytest.approx(cosines, abs=1e-5)
    rounded = peftkit.load(home / "onnx-int8").embed(TEXTS, normalize=True)
    assert 0.98 < (rounded * torchs.embed(TEXTS, normalize=True)).sum(1).min() < 1 - 1e-7
    capsys.readouterr()
    code = (home / "onnx" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code.replace("path/to/this/folder", str(home / "onnx")), "card", "exec"), {})
    first, second = torchs.embed(["a text", "another text"], normalize=True)
    assert float(capsys.readouterr().out.split()[1].strip("[]")) == pytest.approx(float(first @ second), abs=1e-4)


def test_a_model_that_reads_padding_never_sees_any(tmp_path):
    from tests.models import architectures

    installed()
    base = architectures.save_base(architectures.Case("convbert", "classifier"), tmp_path / "base")
    run, _ = exported(tmp_path / "run", base, method=LORA, export=PLAIN)
    run_export(run, tmp_path / "onnx", to_format="onnx")
    ours = peftkit.load(tmp_path / "onnx")
    alone = np.concatenate([ours.logits(text) for text in TEXTS])
    np.testing.assert_allclose(ours.logits(TEXTS), alone, atol=1e-5)
    np.testing.assert_allclose(peftkit.load(run).logits(TEXTS), alone, atol=1e-4)


def test_the_card_says_how_to_run_it(classifier, capsys):
    run, folder, _, _ = classifier
    text = (folder / "README.md").read_text()
    assert "ONNX Runtime loaded this folder" in text
    code = text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(folder))
    exec(compile(code, "card", "exec"), {})
    expected = [p.label for p in peftkit.load(run).predict(["a text", "another text"])]
    assert capsys.readouterr().out.strip() == str(expected)


@pytest.mark.slow
def test_merging_leaves_no_adapter(classifier, tmp_path):
    import onnx as onnx_library

    run_export(classifier[0], tmp_path / "onnx", to_format="onnx", merge=True)
    graph = onnx_library.load(str(tmp_path / "onnx" / onnx.FILE)).graph
    assert not [held.name for held in graph.initializer if "lora" in held.name]


def test_the_runtime_predicts_what_torch_predicts_on_any_lengths(classifier):
    run, folder, _, _ = classifier
    ours, torchs = peftkit.load(folder), peftkit.load(run)
    assert type(ours.model) is installed()
    expected = torchs.logits(TEXTS)
    np.testing.assert_allclose(ours.logits(TEXTS), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert [p.label for p in ours.predict(TEXTS)] == [p.label for p in torchs.predict(TEXTS)]
    assert json.loads((folder / "proof.json").read_text())["passed"]


def test_int8_is_a_smaller_file_with_the_same_answers_and_a_head_in_fp32(classifier):
    import onnx as onnx_library

    folder, fp32, int8, message = classifier
    assert "(0.5 allowed)" in message
    whole, small = (onnx_library.load(str(path / onnx.FILE)).graph for path in (fp32, int8))
    integers = {onnx_library.TensorProto.INT8, onnx_library.TensorProto.UINT8}
    held = {"MatMulInteger", "DynamicQuantizeLinear"}
    assert held <= {node.op_type for node in small.node}
    assert not held & {node.op_type for node in whole.node}
    (head,) = onnx_int8.last_layers(whole)
    assert head in {node.name for node in small.node if node.op_type in onnx_int8.LINEAR}
    large = [tensor for tensor in small.initializer if len(tensor.dims) == 2 and tensor.dims[-1] != 3]
    assert {tensor.data_type for tensor in large} & integers
    ours, torchs = peftkit.load(int8).logits(TEXTS), peftkit.load(folder).logits(TEXTS)
    assert 1e-4 < np.abs(ours - torchs).max() / torchs.std() < 0.5
    assert json.loads((int8 / "proof.json").read_text())["dtype"] == "int8"
    assert "rounded to 8 bits" in (int8 / "README.md").read_text()
    assert "rounded to 8 bits" not in (fp32 / "README.md").read_text()


@pytest.mark.slow
def test_int8_that_went_wrong_is_not_written(bert, tmp_path, monkeypatch):
    installed()
    folder, _ = exported(tmp_path / "run", bert, method=LORA, export=PLAIN)
    monkeypatch.setattr(onnx, "INT8_TOLERANCE", 1e-9)
    with pytest.raises(ExportError, match=r"ONNX in INT8: its logits differ .* rounding to INT8 allows 1e-09"):
        run_export(folder, tmp_path / "onnx", to_format="onnx-int8")
    assert not (tmp_path / "onnx").exists()


def test_merging_is_refused_where_there_is_nothing_to_merge(bert, tmp_path):
    for method in ({"kind": "top_k", "k": 1}, {"kind": "bottleneck"}):
        folder, _ = exported(tmp_path / method["kind"], bert, method=method, export=PLAIN)
        with pytest.raises(MethodError, match="leave --merge out"):
            run_export(folder, tmp_path / "onnx", to_format="onnx", merge=True)


@pytest.mark.slow
def test_other_logits_are_an_error_and_nothing_is_written(bert, tmp_path, monkeypatch):
    OnnxModel = installed()
    folder, _ = exported(tmp_path / "run", bert, method=LORA, export=PLAIN)
    real = OnnxModel.forward

    def wrong(self, *args, **kwargs):
        made = real(self, *args, **kwargs)
        made.logits += 1
        return made

    monkeypatch.setattr(OnnxModel, "forward", wrong)
    with pytest.raises(ExportError, match="export format 'onnx': its logits differ"):
        run_export(folder, tmp_path / "onnx", to_format="onnx")
    assert not (tmp_path / "onnx").exists()


def test_language_models_and_missing_packages_are_told(llama, bert, tmp_path, monkeypatch):
    causal, _ = exported(
        tmp_path / "a", llama, TaskInfo("causal_lm"), method=LORA, task={"kind": "style"}, export=PLAIN
    )
    with pytest.raises(MethodError, match=r"ONNX is not written for task.kind=style"):
        run_export(causal, tmp_path / "onnx", to_format="onnx")
    monkeypatch.setattr(onnx, "WRITE", ("onnx_that_is_not_there",))
    folder, _ = exported(tmp_path / "b", bert, method=LORA, export=PLAIN)
    with pytest.raises(ModelError, match="pip install onnx_that_is_not_there"):
        run_export(folder, tmp_path / "onnx", to_format="onnx")
