"""Pad tokens: never the stop token where the vocabulary has another."""

from __future__ import annotations

import json

import pytest

from peftkit.errors import ModelError
from peftkit.models.tokenizer import load_tokenizer, pad_note, tokenizer_fingerprint, tokenizer_in
from peftkit.schema.recipe import ModelConfig
from tests import tiny


def test_own_pad_token_stays(bert):
    tokenizer = load_tokenizer(ModelConfig(source=str(bert)))
    assert tokenizer.pad_token == "[PAD]"
    assert tokenizer.padding_side == "right"
    assert pad_note(tokenizer) is None


def test_end_of_text_serves_where_the_turn_has_its_own_stop_token(llama):
    tokenizer = load_tokenizer(ModelConfig(source=str(llama)))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_pad_equal_to_stop_is_replaced(llama, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    assert tokenizer_in(tmp_path).pad_token == "<|endoftext|>"


def test_reserved_token_is_preferred(llama, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>"]})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    assert tokenizer_in(tmp_path).pad_token == "<|reserved_special_token_0|>"


def test_gpt2_pads_with_its_only_special_token_and_says_so(tmp_path):
    tokenizer = tokenizer_in(tiny.tiny_gpt2(tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert "masked by position" in (pad_note(tokenizer) or "")


def test_spare_embedding_row_takes_a_new_pad_token(tmp_path):
    tokenizer = tokenizer_in(tiny.tiny_gpt2(tmp_path, vocab_size=320))
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token_id != tokenizer.pad_token_id < 320


def test_fingerprint_knows_rules_specials_and_template(llama):
    tokenizer = load_tokenizer(ModelConfig(source=str(llama)))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == before  # a call leaves padding settings behind
    tokenizer.chat_template = "{{ messages }}"
    changed = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = "<|im_start|>"
    assert len({before, changed, tokenizer_fingerprint(tokenizer)}) == 3


def test_named_chat_template_is_installed(tmp_path):
    folder = tiny.tiny_gpt2(tmp_path)
    assert load_tokenizer(ModelConfig(source=str(folder))).chat_template is None
    named = load_tokenizer(ModelConfig(source=str(folder), chat_template="plain"))
    assert named.chat_template


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 10}))
    with pytest.raises(ModelError, match="tokenizer"):
        tokenizer_in(tmp_path)


@pytest.mark.parametrize("odd", ["", "../../..", -1, True, [], {"a": 1}])
def test_a_longest_length_that_is_no_number_is_named(tmp_path, odd):
    folder = tiny.tiny_gpt2(tmp_path)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": odd}))
    with pytest.raises(ModelError, match=r"model_max_length: expected a number|can be read"):
        tokenizer_in(folder)
