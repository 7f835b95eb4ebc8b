"""A lone adapter merged in memory: peft's own merge, the same answers, the files untouched, and when it is not done."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peftkit.errors import MethodError
from peftkit.export.loading import load_exported
from peftkit.export.merging import merge_in_memory, unmergeable_reason
from peftkit.inference.trained_model import load
from peftkit.schema.types import TaskInfo
from tests import tiny
from tests.exporting import TEXTS, exported

OFF = {"export": {"prove": False}}
MERGED = {
    "lora": {"kind": "lora", "rank": 4, "target_modules": "all-linear"},
    "dora": {"kind": "lora", "rank": 4, "use_dora": True},
    "pissa": {"kind": "lora", "rank": 4, "init_lora_weights": "pissa"},
    "ia3": {"kind": "ia3"},
    "ln_tuning": {"kind": "ln_tuning"},
    "oft": {"kind": "oft", "block_size": 4},
}
APART = {
    "prompt_tuning": {"kind": "prompt_tuning", "virtual_tokens": 2},
    "bottleneck": {"kind": "bottleneck"},
    "bitfit": {"kind": "bitfit"},
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.tiny_bert(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def lora(tmp_path_factory, bert):
    return exported(tmp_path_factory.mktemp("lora") / "run", bert, method=MERGED["lora"], **OFF)[0]


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("name", MERGED)
def test_the_same_logits_and_the_files_as_they_were(name, bert, tmp_path):
    folder, _ = exported(tmp_path / "run", bert, method=MERGED[name], **OFF)
    before = digests(folder), digests(bert)
    apart, model = load(folder, merge=False), load(folder)
    expected, found = apart.logits(TEXTS), model.logits(TEXTS)
    assert model.merge_state.merged
    assert not apart.merge_state.merged
    assert not hasattr(model.model, "peft_config")
    assert model.adapter == "default"
    assert model.adapters == ("default",)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (digests(folder), digests(bert)) == before


def test_weights_are_those_of_pefts_merge(lora, bert):
    from peft import PeftModel

    model = load(lora, merge=True)
    model.merge()
    plain = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    theirs = PeftModel.from_pretrained(plain, lora).merge_and_unload()
    ours = model.model.state_dict()
    assert set(ours) == set(theirs.state_dict())
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours[name].float(), weight.float(), rtol=1e-6, atol=1e-7)


def test_in_bf16_merging_is_no_further_from_fp32_than_bf16_is(bert, tmp_path):
    folder, _ = exported(tmp_path / "run", bert, method=MERGED["lora"], model={"dtype": "bfloat16"}, **OFF)
    apart, model = load(folder, merge=False), load(folder)
    reference = _logits(load_exported(folder, dtype="float32").loaded.model, model.tokenizer)
    ours, theirs = model.logits(TEXTS), apart.logits(TEXTS)
    assert model.merge_state.merged
    assert model.model.get_input_embeddings().weight.dtype == torch.bfloat16
    noise = np.sqrt(np.square(theirs - reference).mean())
    assert 0 < np.sqrt(np.square(ours - reference).mean()) <= 2 * noise


@torch.no_grad()
def _logits(model, tokenizer):
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    return model(**batch).logits.float().numpy()


def test_each_weight_is_rounded_once_and_the_loss_is_measured(lora):
    model = load(lora, merge=False).model
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    exact = layer.base_layer.weight.bfloat16().float() + layer.get_delta_weight("default")
    for part in model.modules():
        if hasattr(part, "base_layer"):
            part.base_layer.to(torch.bfloat16)
    merged, lost = merge_in_memory(model)
    assert torch.equal(merged.bert.encoder.layer[0].attention.self.query.weight, exact.bfloat16())
    assert 0 < lost < 0.2


def test_an_adapter_that_rounding_would_take_stays_apart(bert, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = exported(tmp_path / "run", bert, method=MERGED["lora"], model={"dtype": "bfloat16"}, **OFF)
    weights = load_file(folder / "adapter_model.safetensors")
    small = {name: weight * 0.02 if "lora_B" in name else weight for name, weight in weights.items()}
    save_file(small, folder / "adapter_model.safetensors", {"format": "pt"})
    model, apart = load(folder), load(folder, merge=False)
    np.testing.assert_array_equal(model.logits(TEXTS), apart.logits(TEXTS))
    assert not model.merge_state.merged
    assert "rounding" in model.merge_state.reason


@pytest.mark.parametrize("name", APART)
def test_what_cannot_be_merged_answers_as_it_is_or_is_refused(name, bert, tmp_path):
    folder, _ = exported(tmp_path / "run", bert, method=APART[name], data={"max_length": 64}, **OFF)
    model = load(folder)
    np.testing.assert_array_equal(model.logits(TEXTS), load(folder, merge=False).logits(TEXTS))
    assert not model.merge_state.merged
    assert model.merge_state.reason
    with pytest.raises(MethodError, match="cannot be merged"):
        load(folder, merge=True).predict(TEXTS)


def test_weights_that_layers_share_are_not_merged_into(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny.tiny_llama(tmp_path / "llama"))
    head = get_peft_model(base, LoraConfig(target_modules=["lm_head"]))
    assert "shared" in unmergeable_reason(head, quantized=False)
    assert "quantized" in unmergeable_reason(head, quantized=True)
    assert (
        unmergeable_reason(get_peft_model(head.unload(), LoraConfig(target_modules=["q_proj"])), quantized=False) == ""
    )


def test_a_language_model_writes_the_same(tmp_path):
    base = tiny.tiny_llama(tmp_path / "llama")
    folder, _ = exported(tmp_path / "run", base, TaskInfo("causal_lm"), task={"kind": "style"}, **OFF)
    model, apart = load(folder), load(folder, merge=False)
    prompts = ["the king said", "oil"]
    assert model.generate(prompts, max_new_tokens=12) == apart.generate(prompts, max_new_tokens=12)
    assert model.merge_state.merged
    assert "".join(model.stream("oil", max_new_tokens=5)) == "".join(apart.stream("oil", max_new_tokens=5))


def test_what_needs_the_adapter_apart_reads_it_anew(lora, bert, tmp_path):
    other, _ = exported(tmp_path / "other", bert, method={"kind": "lora", "rank": 2}, **OFF)
    model, apart = load(lora), load(lora, merge=False)
    model.predict(TEXTS)
    assert model.merge_state.merged
    with model.base():
        assert np.abs(model.logits(TEXTS) - apart.logits(TEXTS)).max() > 0.01
    np.testing.assert_array_equal(model.logits(TEXTS), apart.logits(TEXTS))
    again = load(lora)
    again.predict(TEXTS)
    again.use_adapter("default")
    again.add_adapter(other, "other")
    assert again.adapters == ("default", "other")
    assert not again.merge_state.merged
    np.testing.assert_array_equal(again.logits(TEXTS), apart.logits(TEXTS))
    again.use_adapter("other")
    np.testing.assert_array_equal(again.logits(TEXTS), load(other, merge=False).logits(TEXTS))
    with pytest.raises(MethodError, match="several adapters"):
        load(lora, adapters={"other": other}, merge=True)
