"""Building: heads, labels, seeds, dtypes, dropout and attention as the recipe says."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkit.errors import ModelError
from peftkit.models import dtypes
from peftkit.models.loading import build, choose_pooling
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.head import head_of
from peftkit.schema.types import TaskInfo
from tests import tiny

INFO = TaskInfo("single_label_classification", ("cat", "dog", "eel"))
HEAD = head_of(INFO)
MAKERS = {
    "bert": (tiny.tiny_bert, ("classifier",)),
    "distilbert": (tiny.tiny_distilbert, ("pre_classifier", "classifier")),
    "roberta": (tiny.tiny_roberta, ("classifier",)),
    "gpt2": (tiny.tiny_gpt2, ("score",)),
    "llama": (tiny.tiny_llama, ("score",)),
}


def made(folder, info=INFO, **parts):
    recipe = tiny.tiny_recipe(folder, **parts)
    return build(recipe, info, load_tokenizer(recipe.model))


@pytest.mark.parametrize("name", MAKERS)
def test_head_labels_and_problem_type(name, tmp_path):
    maker, heads = MAKERS[name]
    loaded = made(maker(tmp_path), method={"kind": "full"})
    assert loaded.head_names == heads
    assert loaded.model.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert loaded.model.config.label2id == {"cat": 0, "dog": 1, "eel": 2}
    assert loaded.model.config.problem_type == "single_label_classification"
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id
    assert loaded.fingerprint


def test_regression_and_language_model_heads(bert, llama):
    assert made(bert, TaskInfo("regression", ("stars",)), method={"kind": "full"}).model.classifier.out_features == 1
    loaded = made(llama, TaskInfo("causal_lm"))
    assert loaded.head_names == ()
    assert loaded.model.config.vocab_size == loaded.model.get_output_embeddings().out_features


def test_seed_decides_the_head(bert):
    def head(seed):
        return made(bert, method={"kind": "full"}, training={"seed": seed}).model.classifier.weight

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))


@pytest.mark.parametrize(("dtype", "held"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_frozen_in_compute_dtype_and_trained_in_fp32(bert, dtype, held):
    model = made(bert, model={"dtype": dtype}).model
    found = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert found == {(True, torch.float32), (False, held)}


def test_full_finetuning_starts_from_unrounded_weights(bert):
    model = made(bert, model={"dtype": "bfloat16"}, method={"kind": "full"}).model
    stored = load_file(bert / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, stored)


def test_dropout_reaches_every_layer(tmp_path):
    folder = tiny.tiny_bert(tmp_path)
    for rate in (0.0, 0.4):
        model = made(folder, model={"dropout": rate}, method={"kind": "full"}).model
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {rate}
    gpt2 = made(tiny.tiny_gpt2(tmp_path / "gpt2"), model={"dropout": 0.3}, method={"kind": "full"}).model
    assert {m.p for m in gpt2.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


def test_attention_implementation(bert):
    assert made(bert, model={"attention": "eager"}).model.config._attn_implementation == "eager"
    assert made(bert, model={"attention": "sdpa"}).model.config._attn_implementation == "sdpa"


def test_pooling_follows_the_sentence_encoder(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "sentences")
    recipe = tiny.tiny_recipe(folder, method={"kind": "frozen"})
    assert choose_pooling(recipe, HEAD, folder) == "own"
    for mode in ("mean", "cls"):
        tiny.add_pooling(folder, mode)
        assert choose_pooling(recipe, HEAD, folder) == mode
    own = tiny.tiny_recipe(folder, model={"pooling": "own"}, method={"kind": "frozen"})
    assert choose_pooling(own, HEAD, folder) == "own"
    for kind in ("lora", "full", "prompt_tuning", "adalora"):
        assert choose_pooling(tiny.tiny_recipe(folder, method={"kind": kind}), HEAD, folder) == "own"
    for kind in ("bottleneck", "bitfit", "ln_tuning", "ia3", "vera", "trainable_tokens"):
        assert choose_pooling(tiny.tiny_recipe(folder, method={"kind": kind}), HEAD, folder) == "cls"
    assert type(made(folder, method={"kind": "frozen"}).model.get_base_model()).__name__ == "BertForTokenClassification"


def test_missing_pooler_is_trained_with_the_head(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "no_pooler")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = made(folder)
    assert loaded.head_names == ("classifier", "pooler")
    trained = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    assert any("pooler" in name and "modules_to_save" in name for name in trained)


def test_incomplete_checkpoint_is_refused(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "incomplete")
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the weights.*layer\.1\.output\.dense"):
        made(folder)


def test_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="do not belong together"):
        made(tiny.tiny_bert(tmp_path, vocab_size=50))


def test_unknown_architecture_and_task_without_head(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "unknown")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "bert"', '"model_type": "brand_new"'))
    with pytest.raises(ModelError, match="brand_new"):
        made(folder)


def test_base_is_named_for_adapters_and_cards(bert):
    assert made(bert).model.get_base_model().name_or_path == str(bert.resolve())


def test_bf16_is_chosen_only_where_it_is_native(monkeypatch):
    model = tiny.tiny_recipe("x", model={"dtype": "auto"}).model
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(dtypes, "native_bf16", lambda device, native=native: native)
        assert dtypes.dtype_for(model, "cpu") == expected
    assert dtypes.dtype_for(tiny.tiny_recipe("x", model={"dtype": "float16"}).model) == torch.float16
    policy_flags = {"avx512_bf16": True, "avx2": False}
    monkeypatch.undo()
    for flag, expected_native in policy_flags.items():
        dtypes.native_bf16.cache_clear()
        monkeypatch.setattr(dtypes, "cpu_flags", lambda flag=flag: frozenset({flag}))
        assert dtypes.native_bf16("cpu") is expected_native
    dtypes.native_bf16.cache_clear()


def test_loading_says_nothing(bert, capfd):
    made(bert)
    out, err = capfd.readouterr()
    assert out + err == ""
