"""Loading a finished run: the same predictions as training's own, and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkit.errors import DataError, ModelError, RunError
from peftkit.export import manifest
from peftkit.inference.trained_model import load
from peftkit.models import pooled_logits
from peftkit.schema.types import TaskInfo
from tests import tiny
from tests.exporting import TEXTS, exported

MULTI = TaskInfo("multi_label_classification", ("new", "old"))


@pytest.fixture
def run(tmp_path):
    """(run folder, what was trained) of a LoRA on a tiny BERT with mean pooling."""
    folder, made = exported(
        tmp_path / "run", tiny.tiny_bert(tmp_path / "base"), model={"pooling": "mean"}, export={"prove": False}
    )
    return folder.parent, made


@torch.no_grad()
def direct(made, texts, **limits):
    made.loaded.model.eval()
    batch = dict(made.tokenizer(texts, padding=True, return_tensors="pt", **limits))
    return pooled_logits.logits(made.loaded.model, batch, made.loaded.pooling).numpy()


def test_predictions_equal_the_trained_models(run):
    path, made = run
    model = load(path)
    expected = direct(made, TEXTS)
    for size in (1, 7, 64):
        np.testing.assert_allclose(model.logits(TEXTS, batch_size=size), expected, rtol=1e-4, atol=1e-5)
    found = model.predict(TEXTS)
    assert [one.label for one in found] == [("cat", "dog", "eel")[index] for index in expected.argmax(-1)]
    for one in found:
        assert sum(one.probabilities.values()) == pytest.approx(1)
        assert one.probability == max(one.probabilities.values()) == one.probabilities[one.label]
    assert model.labels == ("cat", "dog", "eel")
    assert model.metrics["test"]["accuracy"] == 0.75
    assert model.recipe.name == "tiny"


def test_folder_of_the_adapter_alone_is_enough(run, tmp_path):
    path, _ = run
    moved = shutil.move(path / "adapter", tmp_path / "elsewhere")
    np.testing.assert_allclose(load(moved).logits(["hello"]).shape, (1, 3))


def test_long_texts_are_cut_as_in_training(run):
    path, made = run
    long = "the king said no " * 80
    expected = direct(made, [long], truncation=True, max_length=made.recipe.data.max_length)
    np.testing.assert_allclose(load(path).logits([long]), expected, rtol=1e-4, atol=1e-5)


def test_one_text_pairs_none_and_nonsense(run):
    model = load(run[0])
    assert len(model.predict("hello")) == 1
    assert len(model.predict([("hello", "world"), ("a", "b")])) == 2
    assert model.predict([]) == []
    for wrong in ([3], ["a", 3], ["a", ("b", "c")], [("a", "b", "c")]):
        with pytest.raises(DataError, match=r"text [01]: "):
            model.predict(wrong)


def test_multi_label_and_regression(tmp_path):
    base = tiny.tiny_bert(tmp_path / "base")
    folder, made = exported(tmp_path / "multi", base, MULTI, export={"prove": False})
    model, each = load(folder), 1 / (1 + np.exp(-direct(made, TEXTS[:4])))
    for one, values in zip(model.predict(TEXTS[:4], threshold=0.4), each):
        assert one.label == tuple(label for label, value in zip(MULTI.labels, values) if value >= 0.4)
        assert list(one.probabilities.values()) == pytest.approx(values.tolist(), rel=1e-4)
    folder, made = exported(tmp_path / "stars", base, TaskInfo("regression", ("stars",)), export={"prove": False})
    values = [one.label for one in load(folder).predict(TEXTS[:4])]
    assert values == pytest.approx(direct(made, TEXTS[:4])[:, 0].tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ["full", "top_k", "frozen"])
def test_other_methods_load(method, tmp_path):
    folder, made = exported(
        tmp_path / "run", tiny.tiny_bert(tmp_path / "base"), method={"kind": method}, export={"prove": False}
    )
    np.testing.assert_allclose(load(folder.parent).logits(TEXTS), direct(made, TEXTS), rtol=1e-4, atol=1e-5)


def test_a_language_model_predicts_no_labels(tmp_path):
    folder, _ = exported(
        tmp_path / "run", tiny.tiny_llama(tmp_path / "base"), TaskInfo("causal_lm"), task={"kind": "instruction"},
        export={"prove": False},
    )  # fmt: skip
    with pytest.raises(RunError, match="no labels to predict"):
        load(folder).predict(["hello"])


def test_what_is_no_run(tmp_path, bert):
    with pytest.raises(RunError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(RunError, match="not a run of peftkit"):
        load(bert)
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    with pytest.raises(RunError, match="has not finished"):
        load(tmp_path / "half")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "adapter_config.json").write_text("{}")
    with pytest.raises(RunError, match="did not write"):
        load(tmp_path / "foreign")


def test_another_base_is_refused_naming_both(run, tmp_path):
    path, _ = run
    base = tmp_path / "base" / "model.safetensors"
    weights = load_file(base)
    weights["embeddings.word_embeddings.weight"] += 0.01
    save_file(weights, base, metadata={"format": "pt"})
    about = manifest.read(path / "adapter")
    with pytest.raises(ModelError, match=rf"trained on .*{about.fingerprint[:12]}.*another one"):
        load(path)


def test_pickles_are_refused(run):
    (run[0] / "adapter" / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=r"adapter_model\.bin.*run code"):
        load(run[0])


def test_head_for_other_labels_is_refused(run):
    folder = run[0] / "adapter"
    about = manifest.read(folder)
    manifest.write(folder, replace(about, info=TaskInfo(about.info.problem_type, ("a", "b", "c", "d"))))
    with pytest.raises(ModelError, match="head for 4 labels"):
        load(folder)


def test_damaged_and_missing_weights(run):
    file = run[0] / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load(run[0])
    file.unlink()
    with pytest.raises(ModelError, match="found none"):
        load(run[0])


def test_missing_keys_are_an_error_not_a_warning(run):
    file = run[0] / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks"):
        load(run[0])


def test_adapter_config_that_imports_is_refused(run):
    file = run[0] / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}))
    with pytest.raises(ModelError, match="auto_mapping"):
        load(run[0])
    file.write_text("[]")
    with pytest.raises(ModelError, match="peft_type"):
        load(run[0])
