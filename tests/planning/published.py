"""Configs of published models, and a planned subject of them without any download."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from peftkit.models.meta_model import build_meta_model
from peftkit.models.quantization.stored import WeightFormat
from peftkit.planning.trace import fake_tensor_mode
from peftkit.planning.traced_model import TracedModel
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import TaskInfo

LLAMA = {"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
         "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CONFIGS = {
    "mistral-7b": {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
                   "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "max_position_embeddings": 32768, "sliding_window": 4096, "tie_word_embeddings": False},
    "llama-2-70b": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
TOKENIZER = SimpleNamespace(pad_token_id=0, get_vocab=lambda: {"a": 0})
FORMATS = {"none": None, "nf4": WeightFormat("nf4"), "nf4-dq": WeightFormat("nf4", double=True)}


def recipe_of(name, folder, method):
    """A recipe on a folder that holds nothing but the model's config."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    values = {"name": "published", "model": {"source": str(folder)}, "data": {"source": "none.jsonl"}}
    return Recipe.parse({**values, "task": "instruction", "method": {"kind": "lora", **method}})


def subject_of(recipe, weight_format):
    """The model of a recipe, planned for a GPU; call it inside ``fake_tensor_mode()``."""
    info = TaskInfo("causal_lm")
    loaded = build_meta_model(recipe, info, TOKENIZER, torch.bfloat16, weight_format=weight_format, gpu=True)
    return TracedModel(loaded, head_of(info, recipe.task), torch.bfloat16, True)


__all__ = ["CONFIGS", "FORMATS", "fake_tensor_mode", "recipe_of", "subject_of"]
