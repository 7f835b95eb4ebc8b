"""Exports reload in a fresh process with plain peft and transformers and give the same logits."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkit.errors import ExportError, MethodError, RunError
from peftkit.export import card, manifest, proof, run_export
from peftkit.models import pooled_logits
from peftkit.schema.types import TaskInfo
from peftkit.system.files import atomic_folder
from tests import tiny, warm
from tests.exporting import TEXTS, export, exported, trained

CASES = {
    "bert, mean, LoRA, bf16": (tiny.tiny_bert, {"model": {"pooling": "mean", "dtype": "bfloat16"}}),
    "bert, own, frozen": (tiny.tiny_bert, {"method": {"kind": "frozen"}}),
    "roberta, cls, top_k, bf16": (
        tiny.tiny_roberta, {"model": {"pooling": "cls", "dtype": "bfloat16"}, "method": {"kind": "top_k", "k": 1}},
    ),
    "distilbert, own, full": (tiny.tiny_distilbert, {"method": {"kind": "full"}}),
    "gpt2, own, LoRA": (tiny.tiny_gpt2, {}),
    "llama, own, PiSSA": (tiny.tiny_llama, {"method": {"init_lora_weights": "pissa", "rank": 4}}),
    "bert, own, OLoRA with DoRA": (tiny.tiny_bert, {"method": {"init_lora_weights": "olora", "use_dora": True}}),
}  # fmt: skip


QUICK = list(CASES)[1:3]


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in QUICK)]
)
def test_fresh_process_gives_the_same_logits(case, tmp_path, request):
    if case not in QUICK:
        request.getfixturevalue("cold_processes")
    maker, parts = CASES[case]
    folder, _ = exported(tmp_path / "run", maker(tmp_path / "base"), **parts)
    found = proof.read(folder)
    assert found["passed"]
    assert found["relative"] < 1e-5
    assert (found["rows"], found["logits"]) == (16, 48)
    assert found["spread"] > 0.05
    assert not list(folder.glob("*.bin"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing staged is left


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_language_model_on_nf4(dtype, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")
    base = tiny.tiny_llama(tmp_path / "base", hidden_size=64, intermediate_size=128)
    folder, _ = exported(
        tmp_path / "run", base, TaskInfo("causal_lm"), quantization={"kind": "nf4"},
        method={"init_lora_weights": "gaussian"}, task={"kind": "instruction"}, model={"dtype": dtype},
    )  # fmt: skip
    assert proof.read(folder)["relative"] < 1e-5
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_changed_weights_are_caught(tmp_path):
    folder, made = exported(tmp_path / "run", tiny.tiny_bert(tmp_path / "base"), export={"prove": False})
    assert proof.read(folder) is None
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    weights[name][0] += 0.5  # one row: a layer norm would take back what is added to all
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    about = manifest.read(folder)
    rows = proof.choose_rows(made.encoded, about.head)
    found = proof.prove(folder, made.loaded, about, rows, tolerance=1e-3)
    assert not found.passed
    assert found.relative > 1e-3


def test_a_failed_proof_raises_and_keeps_the_export_aside(tmp_path, monkeypatch):
    made = trained(tiny.tiny_bert(tmp_path / "base"))
    monkeypatch.setattr(proof, "_fresh_logits", lambda job, batch: (torch.randn(16, 3), {}))
    with pytest.raises(ExportError, match=r"export\.tolerance allows 0\.001.*adapter-unproven"):
        export(tmp_path / "run", made)
    assert (tmp_path / "run" / "adapter-unproven" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "adapter").exists()


def test_nan_never_passes():
    found = proof.compare_logits(torch.full((2, 3), torch.nan), torch.randn(2, 3), 1e9, rows=2, dtype="float32")
    assert not found.passed


def test_a_fresh_process_that_cannot_load_is_an_error(tmp_path):
    folder, made = exported(tmp_path / "run", tiny.tiny_bert(tmp_path / "base"), export={"prove": False})
    (folder / "adapter_config.json").unlink()
    about = manifest.read(folder)
    rows = proof.choose_rows(made.encoded, about.head)
    with pytest.raises(ExportError, match="a fresh process cannot load the export"):
        proof.prove(folder, made.loaded, about, rows, tolerance=1e-3)


@pytest.mark.parametrize(
    "pooling", ["mean", *(pytest.param(other, marks=pytest.mark.slow) for other in ("own", "cls"))]
)
def test_the_cards_code_gives_the_trained_models_answers(pooling, tmp_path):
    folder, made = exported(
        tmp_path / "run", tiny.tiny_bert(tmp_path / "base"), model={"pooling": pooling}, export={"prove": False}
    )
    text = (folder / card.FILE).read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    texts = TEXTS[:2]
    code = code.replace('"path/to/this/folder"', repr(str(folder)))
    code = code.replace('["a text", "another text"]', repr(texts)) + "\nprint(logits.tolist())\n"
    done = warm.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    labels, logits = done.stdout.strip().splitlines()[-2:]
    made.loaded.model.eval()
    with torch.no_grad():
        batch = dict(made.tokenizer(texts, padding=True, return_tensors="pt"))
        expected = pooled_logits.logits(made.loaded.model, batch, made.loaded.pooling)
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, rtol=1e-4, atol=1e-5)
    assert labels == str([("cat", "dog", "eel")[index] for index in expected.argmax(-1).tolist()])


def test_the_card_says_what_a_reader_needs(tmp_path):
    folder, _ = exported(tmp_path / "run", tiny.tiny_bert(tmp_path / "base"))
    text = (folder / card.FILE).read_text()
    for piece in ("cat, dog, eel", "| test | 0.75 | 0.5 |", "In a fresh process", "0.001 was allowed", "## Limits",
                  "recipe.yaml", "library_name: peft", "none.csv"):  # fmt: skip
        assert piece in text
    assert text.startswith("---\n")


def test_description_round_trips(tmp_path):
    info = TaskInfo("multi_label_classification", ("a", "b"), (1.0, 2.0))
    folder, _ = exported(tmp_path / "run", tiny.tiny_bert(tmp_path / "base"), info, export={"prove": False})
    about = manifest.read(folder)
    assert about.info == info
    assert about.heads == ("classifier",)
    manifest.write(folder, about)
    assert manifest.read(folder) == about
    (folder / manifest.FILE).write_text(json.dumps({"format": 99}))
    with pytest.raises(RunError, match="newer peftkit"):
        manifest.read(folder)
    (folder / manifest.FILE).write_text("{")
    with pytest.raises(RunError, match="expected JSON"):
        manifest.read(folder)
    (folder / manifest.FILE).write_text("{}")
    with pytest.raises(RunError, match="not as peftkit writes it"):
        manifest.read(folder)


@pytest.mark.parametrize("maker", [tiny.tiny_bert, tiny.tiny_gpt2])
def test_merged_model_loads_in_plain_transformers(maker, tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder, made = exported(tmp_path / "run", maker(tmp_path / "base"), export={"prove": False, "merge": True})
    merged = folder.parent / "merged"
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    made.loaded.model.eval()
    with torch.no_grad():
        batch = dict(made.tokenizer(TEXTS[:4], padding=True, return_tensors="pt"))
        torch.testing.assert_close(model(**batch).logits, made.loaded.model(**batch).logits, rtol=1e-3, atol=1e-4)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert proof.read(merged) is None  # export.prove=false


def test_export_command(tmp_path):
    folder, _ = exported(tmp_path / "run", tiny.tiny_bert(tmp_path / "base"), export={"prove": False})
    said = run_export(folder.parent, tmp_path / "copy")
    assert "nothing was proven" in said
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in folder.iterdir()}
    said = run_export(folder.parent, tmp_path / "merged", merge=True)
    assert proof.read(tmp_path / "merged")["passed"]
    assert "0.001 allowed" in said
    with pytest.raises(RunError, match="not an empty folder"):
        run_export(folder.parent, tmp_path / "copy")
    with pytest.raises(RunError, match="no such folder"):
        run_export(tmp_path / "nowhere", tmp_path / "other")


def test_whole_models_have_nothing_to_merge(tmp_path):
    folder, _ = exported(
        tmp_path / "run", tiny.tiny_bert(tmp_path / "base"), method={"kind": "full"}, export={"prove": False}
    )
    with pytest.raises(MethodError, match="nothing to merge"):
        run_export(folder.parent, tmp_path / "merged", merge=True)


def test_a_staged_folder_replaces_the_old_one_or_leaves_it(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as stage:
        (stage / "a").write_text("1")
    with pytest.raises(FileNotFoundError), atomic_folder(target) as stage:
        (stage / "nowhere" / "a").write_text("2")
    assert (target / "a").read_text() == "1"
    with atomic_folder(target) as stage:
        (stage / "b").write_text("3")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
