"""Whole runs with offloaded blocks end with the bytes of runs without, and their results are used in the same way."""

from __future__ import annotations

import json

import pytest

import peftkit
from peftkit import Recipe, replace
from peftkit.errors import Interrupted, RecipeError
from peftkit.models import offload
from tests import tiny

DISK = {"offload": "disk"}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, topics_csv):
    folder = tmp_path_factory.mktemp("classifier")
    base = tiny.tiny_bert(folder / "bert", num_hidden_layers=4)
    return Recipe.parse(
        {
            "name": "topics",
            "model": {"source": str(base), "dtype": "float32"},
            "data": {"source": str(topics_csv), "max_length": 32},
            "method": {"kind": "lora", "rank": 4, "dropout": 0.1},
            "training": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-2, "threads": 1},
            "evaluation": {"baselines": ["majority"]},
            "export": {"prove": False},
            "tracking": [],
            "output_dir": str(folder / "runs"),
        }
    )


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writer")
    rows = [{"instruction": f"say {n % 5} and {n}", "input": "", "output": f"it is {n % 5}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = tiny.tiny_llama(folder / "llama", num_hidden_layers=4)
    return Recipe.parse(
        {
            "name": "answers",
            "model": {"source": str(base), "dtype": "float32"},
            "data": {"source": str(folder / "rows.jsonl"), "max_length": 64},
            "task": "instruction",
            "method": {"kind": "lora", "rank": 8},
            "training": {"epochs": 1, "batch_size": 8, "learning_rate": 2e-2, "threads": 1,
                         "gradient_checkpointing": "full"},
            "evaluation": {"generation": {"max_new_tokens": 6, "samples": 2}},
            "export": {"prove": True},
            "tracking": [],
            "output_dir": str(folder / "runs"),
        }
    )  # fmt: skip


def weights(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_a_classifier_ends_with_the_same_bytes_interrupted_or_not(classifier, topics_csv):
    plain = peftkit.train(classifier, quiet=True)
    offloaded = peftkit.train(replace(classifier, model=DISK), quiet=True)
    assert weights(offloaded) == weights(plain)
    assert offloaded.metrics["test"] == plain.metrics["test"]
    notes = json.loads((offloaded.path / "about.json").read_text())["notes"]
    assert any("frozen weights of 4 blocks" in note and "at most 2 blocks" in note for note in notes)
    with pytest.raises(Interrupted):
        peftkit.train(replace(classifier, name="stopped", model=DISK, training={"max_time": 1e-6}), quiet=True)
    resumed = peftkit.train(replace(classifier, name="stopped"), resume=True, quiet=True)
    assert weights(resumed) == weights(plain), "resumed without offloading"
    texts = ["game team player match", "stock bank money price"]
    loaded, expected = peftkit.load(offloaded.path), peftkit.load(plain.path, merge=False)
    assert (loaded.logits(texts) == expected.logits(texts)).all()
    assert offload.has_offloaded_blocks(loaded.model)
    assert not loaded.merge_state.merged
    assert "model.offload" in loaded.merge_state.reason
    loaded.add_adapter(plain.path, "second")
    loaded.use_adapter("second")
    assert (loaded.logits(texts) == expected.logits(texts)).all()


@pytest.mark.slow
def test_a_language_model_generates_and_exports_with_proof(writer):
    plain = peftkit.train(writer, quiet=True)
    offloaded = peftkit.train(replace(writer, model=DISK), quiet=True)
    assert weights(offloaded) == weights(plain)
    assert json.loads((offloaded.adapter / "proof.json").read_text())
    written = [(run.path / "generations.jsonl").read_text() for run in (plain, offloaded)]
    assert written[0] == written[1]
    loaded = peftkit.load(offloaded.path)
    assert loaded.generate("say 1 and 3") == peftkit.load(plain.path, merge=False).generate("say 1 and 3")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_runs_end_with_the_same_bytes(writer, quantization):
    pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")
    recipe = replace(writer, quantization={"kind": quantization}, export={"prove": False})
    base = replace(recipe, name=quantization)
    assert weights(peftkit.train(replace(base, model=DISK), quiet=True)) == weights(peftkit.train(base, quiet=True))


@pytest.mark.slow
def test_a_merged_export_is_the_same(classifier):
    recipe = replace(classifier, name="merged", export={"merge": True}, training={"epochs": 1})
    plain, offloaded = (peftkit.train(each, quiet=True) for each in (recipe, replace(recipe, model=DISK)))
    files = [(run.path / "merged" / "model.safetensors").read_bytes() for run in (plain, offloaded)]
    assert files[0] == files[1]
    assert not offload.has_offloaded_blocks(peftkit.load(offloaded.path / "merged").model)


def test_host_memory_is_refused_where_it_is_the_devices_own(classifier):
    with pytest.raises(RecipeError, match=r"model\.offload=disk"):
        peftkit.train(replace(classifier, model={"offload": {"to": "cpu"}}), quiet=True)
