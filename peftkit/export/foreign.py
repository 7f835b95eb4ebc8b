"""Adapters that peft wrote without peftkit, merged into their base for another training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from peftkit.errors import ModelError
from peftkit.export import proof
from peftkit.export.folder import ADAPTER_WEIGHTS
from peftkit.export.loading import check_adapter_config, check_same_names
from peftkit.export.merging import unwrap_heads
from peftkit.models.loading import writes_text
from peftkit.models.sources import folder_of, resolve
from peftkit.models.tokenizer import tokenizer_in
from peftkit.schema.recipe import ModelConfig

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering", "FEATURE_EXTRACTION": "AutoModel",
}  # fmt: skip
"""peft's names for what a model does."""
TOLERANCE = 1e-3


def merge_foreign(adapter: Path, base: ModelConfig, folder: Path) -> None:
    """Writes a base with a peft adapter merged into it, in fp32, and compares it with base and adapter.

    Raises:
        ModelError: the adapter does not fit the base, or peft cannot merge it.
        ExportError: the merged model gives other outputs.
    """
    from peft import PeftModel

    source, config = folder_of(resolve(base)), check_adapter_config(adapter)
    names, labels = _weights(adapter)
    auto = _auto_class(config, source)
    arguments = {"num_labels": labels} if labels else {}
    tokenizer = tokenizer_in(source)
    try:
        plain: Any = auto.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, ignore_mismatched_sizes=True,
            **arguments,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # check_same_names reports missing weights
            model = PeftModel.from_pretrained(plain, adapter).eval()
    except Exception as error:
        # odd values in a stranger's config break peft in as many ways as there are values
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"model.adapter: {adapter} does not fit {base.source}: {first[:300]}") from error
    check_same_names(model, adapter, names, "default")
    before = _outputs(model, tokenizer)
    try:
        merged = unwrap_heads(model.merge_and_unload())
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"model.adapter: {adapter} cannot be merged into the base ({error})") from error
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reloaded: Any = auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
    after = _outputs(reloaded.eval(), tokenizer)
    proven = proof.compare_logits(after, before, TOLERANCE, rows=len(proof.TEXTS), dtype="float32")
    proven.check(f"merged from {adapter}", "peftkit")
    proven.write(folder)


def _auto_class(config: dict[str, Any], source: Path) -> Any:
    name = CLASSES.get(str(config.get("task_type")))
    if name is None:
        base = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        name = "AutoModelForCausalLM" if writes_text(base) else "AutoModel"
    return getattr(transformers, name)


def _weights(adapter: Path) -> tuple[list[str], int]:
    """Names of the adapter's weights, and rows of the last matrix of a head that came with it (0: none)."""
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        names = list(file.keys())
        heads = [
            file.get_slice(name).get_shape()
            for name in sorted(names)
            if name.rpartition(".")[0].rpartition(".")[2] in ("classifier", "score", "out_proj", "qa_outputs")
        ]
    rows = [shape[0] for shape in heads if len(shape) == 2]
    return names, rows[-1] if rows else 0


@torch.no_grad()
def _outputs(model: Any, tokenizer: Any) -> torch.Tensor:
    """First output of a few texts, without padding: [tokens, …] or [texts, classes]."""
    rows = []
    for text in proof.TEXTS:
        encoded = tokenizer(text, return_tensors="pt")
        batch = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
        rows.append(model(**batch)[0].flatten(0, -2))
    return torch.cat(rows)
