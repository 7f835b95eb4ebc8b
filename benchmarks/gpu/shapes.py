"""Models by the shape of published ones, with random weights: speed and memory do not depend on values.

Weights are drawn on the device that measures and stay in bf16. A folder that is complete is used again.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu"}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "llama-3.2-1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "llama-3.1-8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 8192,
    },
    "qwen3-4b": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    },
    "roberta-large": {
        "model_type": "roberta", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
    },
    "modernbert-base": {
        "model_type": "modernbert", "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
        "num_attention_heads": 12, "vocab_size": 50368, "max_position_embeddings": 8192,
    },
}  # fmt: skip
"""Configs of SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B, Qwen3-4B, RoBERTa-large and ModernBERT-base."""
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
"""For a dry run: what is replaced of a shape; the vocabulary stays, for the tokenizer's sake."""
SHARD = 4 * 10**9
"""Bytes per file."""


def save(name: str, root: Path, tokenizer: Path, *, device: str, tiny: bool = False) -> Path:
    """A model folder of that shape under ``root``, with the tokenizer's files."""
    folder = root / name
    if (folder / "complete").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tokenizer, folder)
    model = skeleton(name, tokenizer, tiny=tiny)
    model.config.save_pretrained(folder)
    _write_weights(model, folder, device)
    (folder / "complete").touch()
    return folder


def skeleton(name: str, tokenizer: Path, *, tiny: bool) -> Any:
    """The model of a shape, without data."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    values = dict(SHAPES[name])
    if tiny:
        values |= {key: value for key, value in TINY.items() if key in values}
        if "num_key_value_heads" in values:
            values["num_key_value_heads"] = 2
    special = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    by_text = {token["content"]: token["id"] for token in ids}
    for key in ("bos_token", "eos_token", "pad_token"):
        if special.get(key) in by_text:
            values[f"{key}_id"] = by_text[special[key]]
    if values["model_type"] == "modernbert":  # special tokens that transformers' defaults put beyond the vocabulary
        values |= {"cls_token_id": values["bos_token_id"], "sep_token_id": values["eos_token_id"]}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.dtype = torch.bfloat16
    writes = config.model_type in ("llama", "qwen3")
    with torch.device("meta"):
        model = (AutoModelForCausalLM if writes else AutoModel).from_config(config, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    return model


def _write_weights(model: Any, folder: Path, device: str) -> None:
    """Random matrices of a scale that keeps activations finite, norms of one, biases of zero."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    size = 0
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        if size + 2 * parameter.numel() > SHARD:
            shards.append({})
            size = 0
        if parameter.ndim >= 2:
            scale = 0.5 / math.sqrt(parameter.shape[-1])
            tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(0, scale).cpu()
        else:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            tensor = fill(parameter.shape, dtype=torch.bfloat16)
        shards[-1][name] = tensor
        size += 2 * parameter.numel()
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        about = {"metadata": {}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(about), encoding="utf-8")
