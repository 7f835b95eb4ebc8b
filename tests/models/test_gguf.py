"""A GGUF file becomes an ordinary model folder, once; the file is written by the gguf package itself."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from peftkit.errors import ModelError
from peftkit.models import gguf as subject
from peftkit.system import cache
from tests.tiny import CHATML, tiny_llama

gguf = pytest.importorskip("gguf")
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """A tiny Llama in Q8_0, with its byte-level tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, model.config)
    _add_tokenizer(writer, tokenizer)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            _add_tensor(writer, name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer, config) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer, tokenizer) -> None:
    import json

    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = set(tokenizer.all_special_tokens)
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(CHATML)


def _add_tensor(writer, name: str, value: np.ndarray) -> None:
    name = name.removeprefix("model.").removesuffix(".weight")
    renamed = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(name)
    if renamed is None:
        _, layer, part = name.split(".", 2)
        renamed = f"blk.{layer}.{NAMES[part]}"
    if value.ndim == 1:
        writer.add_tensor(f"{renamed}.weight", value.astype(np.float32))
    else:
        packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{renamed}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)


def test_folder_holds_exactly_what_transformers_reads_from_the_file(gguf_file):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    direct = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    folder = subject.dequantize(gguf_file)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert model.state_dict().keys() == direct.state_dict().keys()
    for name, value in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "<|im_end|>"


def test_second_call_converts_nothing_and_a_deleted_or_cut_cache_is_made_again(gguf_file, monkeypatch):
    folder = subject.dequantize(gguf_file)
    real, calls = subject._read, []
    monkeypatch.setattr(subject, "_read", lambda path: calls.append(path) or real(path))
    assert subject.dequantize(gguf_file) == folder
    assert calls == []
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert subject.dequantize(gguf_file) == folder
    assert len(calls) == 1
    shutil.rmtree(folder)
    assert (subject.dequantize(gguf_file) / "config.json").is_file()
    assert len(calls) == 2


def test_key_follows_the_content_not_the_name(gguf_file, tmp_path):
    folder = subject.dequantize(gguf_file)
    copied = shutil.copy(gguf_file, tmp_path / "other.gguf")
    assert subject.dequantize(Path(copied)) == folder
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(gguf_file.read_bytes() + b"\0")
    assert subject.dequantize(changed) != folder


def test_a_conversion_that_fails_leaves_nothing(gguf_file, monkeypatch):
    def fail(path):
        raise RuntimeError("disk full")

    monkeypatch.setattr(subject, "_read", fail)
    with pytest.raises(RuntimeError):
        subject.dequantize(gguf_file)
    assert not [path for path in cache.cache_folder("gguf").iterdir() if path.is_dir()]


def _ask(path: str, queue) -> None:
    queue.put(str(subject.dequantize(Path(path))))


def test_processes_that_ask_at_once_share_one_folder(gguf_file):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_ask, args=(str(gguf_file), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(30)
    assert len(answers) == 1
    assert len([path for path in cache.cache_folder("gguf").iterdir() if path.is_dir()]) == 1


def test_wrong_files_are_one_message(gguf_file, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="there is no file"):
        subject.dequantize(tmp_path / "none.gguf")
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    with pytest.raises(ModelError, match="expected a GGUF file"):
        subject.dequantize(text)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:200])
    with pytest.raises(ModelError, match="cannot dequantize"):
        subject.dequantize(broken)
    monkeypatch.setattr(subject.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'peftkit\[gguf\]'"):
        subject.dequantize(gguf_file)
