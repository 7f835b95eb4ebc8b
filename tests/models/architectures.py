"""Every model type that transformers registers for classification or language modeling, as a tiny model: what becomes
of it under LoRA.

python -m tests.models.architectures > docs/architectures.md
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto import modeling_auto

from peftkit.errors import UserError
from peftkit.export import verify_worker
from peftkit.models.architectures import READS_PADDING
from peftkit.models.third_party import silence_libraries
from tests import tiny
from tests.methods import every_method

USES = ("classifier", "language model")
AUTO: dict[str, Any] = {"classifier": AutoModelForSequenceClassification, "language model": AutoModelForCausalLM}
NAMES = {
    "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "language model": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
TYPES = sorted({name for names in NAMES.values() for name in names})
ROWS = 64
SHOWN = 3
"""Modules named in a cell."""
SMALL: dict[str, Any] = {
    "vocab_size": 321, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "embedding_size": 32, "model_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "d_head": 8,
    "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "d_inner": 64, "n_inner": 64, "hidden_dim": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "ffn_hidden_size": 64, "moe_intermediate_size": 32,
    "max_position_embeddings": ROWS, "n_positions": ROWS, "max_seq_len": ROWS,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "initializer_range": 0.2,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "ssm_state_size": 8, "state_size": 8, "mamba_chunk_size": 16, "chunk_size": 16,
    "linear_num_heads": 4, "linear_head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
NARROW_LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
INDEXED = {**NARROW_LATENT, "index_topk": ROWS, "index_head_dim": 8, "index_n_heads": 4}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
START = {"decoder_start_token_id": 0}
OWN: dict[str, dict[str, Any]] = {
    "axk1": NARROW_LATENT,
    "axk2": NARROW_LATENT,
    "bailing_hybrid": {"layer_group_size": 2, "layer_types": ["linear_attention", "full_attention"], **NARROW_LATENT},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4},
    },
    "deepseek_v2": NARROW_LATENT,
    "deepseek_v3": NARROW_LATENT,
    "deepseek_v32": INDEXED,
    "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": None},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"vocab_size_per_layer_input": 321, "hidden_size_per_layer_input": 8},
    "glm4_moe_lite": NARROW_LATENT,
    "glm_moe_dsa": INDEXED,
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hy_v4": INDEXED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**NARROW_LATENT, **HYBRID},
    "layoutlm": {"initializer_range": 0.02},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**NARROW_LATENT, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2},
    "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "minicpm3": {**NARROW_LATENT, "head_dim": 8},
    "mistral4": {**NARROW_LATENT, "head_dim": 16},
    "mobilebert": {"intra_bottleneck_size": 32, "classifier_activation": False},
    "mt5": START,
    "perceiver": {
        "num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": {
        **HYBRID, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh"],
        "attention_head_size": 8, "feed_forward_size": 64, "is_decoder": False, "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 64},
    "t5": START,
    "umt5": START,
    "youtu": NARROW_LATENT,
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What an architecture needs beyond ``SMALL``."""


def registered(use: str) -> set[str]:
    """The model types that transformers has a class of this use for."""
    return set(NAMES[use])


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A small configuration of a model type."""
    return _small(CONFIG_MAPPING[model_type], {**OWN.get(model_type, {}), **changes})


def _small(config_class: Any, own: dict[str, Any]) -> Any:
    default = config_class()
    values = {name: value for name, value in SMALL.items() if name in default.to_dict()}
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig) and name not in own:
            values[name] = _small(type(part), OWN.get(part.model_type, {})).to_dict()
    return config_class(**{**values, **own})


@dataclass(frozen=True)
class Case:
    """One model type in one use."""

    model_type: str
    use: str

    @property
    def model(self) -> str:
        """The kind of model, as tests of methods name it."""
        return {"classifier": "encoder", "language model": "decoder"}[self.use]

    def __str__(self) -> str:
        return f"{self.model_type}-{self.use.replace(' ', '-')}"

    def recipe(self, folder: Path, **parts: Any) -> Any:
        """The case as a recipe: LoRA on every linear layer."""
        fields = {
            "method": {"kind": "lora", "rank": 4}, "task": {"kind": every_method.TASKS[self.model]},
            "data": {"source": "none.csv", "max_length": ROWS // 2},
        }  # fmt: skip
        return tiny.tiny_recipe(folder, **{**fields, **parts})


def cases() -> list[Case]:
    """Every type in every use that it is registered for."""
    return [Case(name, use) for name in TYPES for use in USES if name in NAMES[use]]


def save_base(case: Case, folder: Path) -> Path:
    """Writes the tiny model, without a tokenizer of its own: one vocabulary serves all."""
    tiny.tiny_tokenizer(folder, "roberta")
    torch.manual_seed(1234)
    changes = {"is_decoder": True} if case == Case("reformer", "language model") else {}
    AUTO[case.use].from_config(tiny_config(case.model_type, **changes)).eval().save_pretrained(folder)
    config = tiny_config(case.model_type)
    if getattr(config, "is_encoder_decoder", False):  # a decoder alone is saved as one that never had an encoder
        config.save_pretrained(folder)
    return folder


def walk(case: Case, work: Path) -> SimpleNamespace:
    """What became of a case.

    ``refused`` says why; of a trained one, ``still`` and ``strays`` are the trainable parameters that did not move and
    the frozen ones that did, ``reloaded`` is how far the logits of plain peft are from the trained model's, ``alone``
    how far a row's outputs alone are from those among others, and ``ahead`` how far the outputs of a language model's
    first tokens are from those before other later ones; all in standard deviations.
    """
    base = save_base(case, work / "base")
    try:
        made = every_method.train(case, base, rate=2e-2)
    except UserError as error:
        return SimpleNamespace(refused=str(error).replace(str(base), "BASE"))
    trained = {name for name, parameter in made.loaded.model.named_parameters() if parameter.requires_grad}
    saved = every_method.save(made, work / "adapter")
    again = verify_worker.load(saved["job"]).eval()
    with torch.no_grad():
        logits = verify_worker.logits(again, saved["batch"], saved["job"]["pooling"])
    return SimpleNamespace(
        refused="", losses=made.losses, trained=sorted(trained), still=sorted(trained - made.changed),
        strays=sorted(made.changed - trained),
        reloaded=float((logits - saved["logits"]).abs().max() / saved["logits"].std()), alone=_alone(made),
        ahead=_ahead(made) if case.use == "language model" else 0.0,
    )  # fmt: skip


@torch.no_grad()
def _alone(made: SimpleNamespace) -> float:
    """The largest difference between a row's outputs alone and among the others."""
    made.module.eval()
    name = "loss" if made.cell.use == "language model" else "logits"
    together = made.module(made.batch | {"weight": torch.ones(len(made.batch["labels"]))}, outputs=True)[name]
    lengths = made.batch["attention_mask"].sum(-1).tolist()
    left = made.loaded.tokenizer.padding_side == "left"
    alone = []
    for row, length in enumerate(lengths):
        one = {key: value[row : row + 1] for key, value in made.batch.items()} | {"weight": torch.ones(1)}
        cut = slice(-length, None) if left else slice(length)
        one = {key: value[:, cut] if value.dim() == 2 else value for key, value in one.items()}
        alone.append(made.module(one, outputs=True)[name])
    return float((torch.cat(alone) - together).abs().max() / together.std())


@torch.no_grad()
def _ahead(made: SimpleNamespace) -> float:
    """The largest change of the logits of first tokens when later ones change."""
    model, ids = made.loaded.model.eval(), made.batch["input_ids"][1:2]
    changed, half = ids.clone(), ids.shape[1] // 2
    changed[:, half:] = (changed[:, half:] + 7) % 300 + 5
    before, after = (model(input_ids=each, use_cache=False).logits[:, :half] for each in (ids, changed))
    return float((before - after).abs().max() / before.std())


UNBUILT = {
    "blt": "its forward pass fails in this version of transformers unless it is told to use no cache",
    "dots3_note": "its encoders of images and audio have no small form",
    "gemma3n": "its image encoder needs the timm package",
    "gemma4_assistant": "a draft model, which reads another model's hidden states",
    "gemma4_unified_assistant": "a draft model, which reads another model's hidden states",
    "layoutlmv2": "needs the detectron2 package",
    "musicgen": "writes audio",
    "musicgen_melody": "writes audio",
    "xlstm": "its recurrent states do not fit the sizes of a tiny model",
}
"""Types of which no tiny model of texts can be made with the packages that tests install."""
PEFT_LOSES = {"laguna": "peft loses the adapters of `shared_experts` when it loads them"}
"""Types whose export peftkit refuses, because plain peft gives other outputs for what was saved."""


def unused(found: SimpleNamespace) -> list[str]:
    """The smallest number of modules that hold all trainable parameters that no gradient reached, layers as ``*``."""
    moved = {name for name in found.trained if name not in found.still}
    modules = {}
    for name in found.still:
        parts = name.removeprefix("base_model.model.").partition(".lora_")[0].split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        first = next(
            (each for each in prefixes if not any(f".{each}." in f".{other}" for other in moved)), ".".join(parts)
        )
        modules[".".join("*" if part.isdecimal() else part for part in first.split("."))] = None
    return list(modules)


def check(case: Case, found: SimpleNamespace) -> None:
    """Asserts that a trained case learned, moved nothing else, comes back the same, and has rows of their own."""
    if found.refused:
        return
    assert found.losses[-1] < found.losses[0]
    assert len(found.still) < len(found.trained)
    assert not found.strays
    assert (found.reloaded < 1e-4) == (case.model_type not in PEFT_LOSES)
    assert found.alone < 1e-4 or case.model_type in READS_PADDING
    assert found.ahead < 1e-4


def cell(case: Case, found: SimpleNamespace) -> str:
    """A case in the table."""
    if found.refused:
        return "refused: " + found.refused.removeprefix("BASE: ")
    notes = []
    if modules := unused(found):
        shown = ", ".join(f"`{name.removeprefix('model.')}`" for name in modules[:SHOWN])
        notes.append(f"no gradient reaches {shown}" + (", …" if len(modules) > SHOWN else ""))
    if found.alone >= 1e-4:
        notes.append(
            f"reads padding through {READS_PADDING[case.model_type]}, so micro-batches have rows of one length"
        )
    if reason := PEFT_LOSES.get(case.model_type):
        return "; ".join([f"trained, but not exported: {reason}", *notes])
    return "; ".join(["trained, reloaded", *notes])


def table(found: dict[Case, str]) -> str:
    """The page of the documentation, from the cells of all cases."""
    lines = ["| model type | " + " | ".join(USES) + " |", "|---|" + "---|" * len(USES)]
    for name in TYPES:
        cells = [found.get(Case(name, use), "–") for use in USES]
        lines.append(
            f"| `{name}` | " + " | ".join(each.replace("\n", " ").replace("|", "\\|") for each in cells) + " |"
        )
    return "\n".join(lines) + "\n"


HEADING = """# Architectures

Every model type that transformers registers for sequence classification or causal language modeling, as a tiny model
under LoRA on every linear layer, through peftkit's own path. "Trained" means that the loss fell and no frozen parameter
moved; "reloaded", that plain peft gives the same outputs from what was saved. Unless a note says otherwise, the outputs
of a row do not depend on the other rows of its batch, and those of a language model's token not on later ones. A dash
stands where transformers has no such class. This page is written by `python -m tests.models.architectures`.

"""


def outcome(case: Case, work: Path) -> str:
    """A case's cell, after its checks."""
    if case.model_type in UNBUILT:
        return "not tried: " + UNBUILT[case.model_type]
    found = walk(case, work)
    check(case, found)
    return cell(case, found)


def main() -> None:
    """Prints the page."""
    silence_libraries()
    torch.set_num_threads(1)
    found = {}
    for case in cases():
        with tempfile.TemporaryDirectory() as place:
            found[case] = outcome(case, Path(place))
        print(f"{case}: {found[case]}", file=sys.stderr, flush=True)
    print(HEADING + table(found), end="")


if __name__ == "__main__":
    main()
