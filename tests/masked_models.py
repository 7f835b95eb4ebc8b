"""Tiny masked language models of several architectures, made in a second: base and output layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ROBERTA = {"max_position_embeddings": 130, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0,
           "eos_token_id": 2}  # fmt: skip
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 128}
DEBERTA = {**SIZES, "max_position_embeddings": 128, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
           "type_vocab_size": 0}  # fmt: skip
MODERNBERT = {**SIZES, "max_position_embeddings": 128, "global_attn_every_n_layers": 2, "local_attention": 16,
              "pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3,
              "sep_token_id": 3}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("wordpiece", "Bert", {**SIZES, "max_position_embeddings": 128}),
    "roberta": ("roberta", "Roberta", {**SIZES, **ROBERTA}),
    "xlm_roberta": ("roberta", "XLMRoberta", {**SIZES, **ROBERTA}),
    "distilbert": ("distilbert", "DistilBert", DISTILBERT),
    "deberta_v2": ("distilbert", "DebertaV2", DEBERTA),
    "deberta_v3": ("distilbert", "DebertaV2", {**DEBERTA, "legacy": False, "position_biased_input": False,
                                               "norm_rel_ebd": "layer_norm", "share_att_key": True,
                                               "position_buckets": 16}),
    "modernbert": ("distilbert", "ModernBert", MODERNBERT),
}  # fmt: skip
"""Tokenizer, the class's prefix in transformers, and the config."""


def masked_model(folder: str | Path, name: str = "bert", *, head: bool = True) -> Path:
    """Saves a model and its tokenizer; without ``head`` the encoder alone, as many checkpoints are."""
    import torch
    import transformers

    tokenizer, prefix, sizes = ARCHITECTURES[name]
    folder = tiny.tiny_tokenizer(folder, tokenizer)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    config = getattr(transformers, f"{prefix}Config")(vocab_size=size, initializer_range=0.2, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = getattr(transformers, f"{prefix}{'ForMaskedLM' if head else 'Model'}")(config)
    model.eval().save_pretrained(folder)
    return folder
