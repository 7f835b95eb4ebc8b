"""What single architectures need that their configs do not say: which cannot write or train, and how they pad."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BIDIRECTIONAL = frozenset({"bert-generation", "cpmant", "xlm", "xlnet"})
"""Models that read ahead as language models, besides those that are also registered as masked ones."""
READS_LAST_PLACE = frozenset({"xlnet"})
"""Models whose classifier reads the last place of a row, whatever is there: rows are padded on the left."""
READS_PADDING = {
    "canine": "its downsampling",
    "convbert": "its convolutions",
    "fnet": "its Fourier transforms",
    "funnel": "its pooling of neighbors",
    "nystromformer": "its convolutions",
    "t5gemma": "its decoder, which reads the place after a text",
    "t5gemma2": "its decoder, which reads the place after a text",
}
"""What lets padding into the hidden states of a row, by model type."""

NEEDS_CUDA = frozenset({"mra"})
"""Models whose attention is zero without a CUDA kernel; transformers says nothing."""

WRONG_MASK = frozenset({"yoso"})
"""Models whose attention expects masks of -10000, and gets the lowest number of the dtype from transformers 5."""


def check_trains(config: PreTrainedConfig, device: object, folder: Path) -> None:
    """Raises ModelError for a model that cannot be trained on texts of various lengths, or on the device."""
    if config.model_type == "reformer" and getattr(config, "axial_pos_embds", True):
        tokens = math.prod(config.axial_pos_shape)
        raise ModelError(
            f"{folder}: reformer models with axial positions train on rows of exactly {tokens} tokens; choose another "
            "base model"
        )
    if config.model_type == "xmod" and not getattr(config, "default_language", None):
        raise ModelError(
            f"{folder}: xmod models have adapters for each language; set default_language in config.json to one of its "
            "languages"
        )
    if config.model_type in WRONG_MASK:
        raise ModelError(
            f"{folder}: the attention of {config.model_type} models is wrong in transformers 5 where rows are padded; "
            "choose another base model"
        )
    if config.model_type in NEEDS_CUDA and not str(device or "cpu").startswith("cuda"):
        raise ModelError(
            f"{folder}: the attention of {config.model_type} models exists for CUDA only, and is zero elsewhere; "
            "choose another base model, or a machine with a GPU"
        )


def check_writes(config: PreTrainedConfig, folder: Path) -> None:
    """Raises ModelError for a model that does not predict each token from those before it alone."""
    remedy = "choose a decoder, such as a Llama or Qwen model"
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{folder}: {kind} models write from an encoder's reading of another text, and this task learns from one "
            f"text; set task.kind=seq2seq, or {remedy}"
        )
    if reads_ahead(config):
        raise ModelError(
            f"{folder}: {kind} models read texts in both directions, so they would see each token that they learn to "
            f"predict; {remedy}, or train a classifier on this one"
        )


def check_pools(config: PreTrainedConfig, vectors: int, tokens: int) -> None:
    """Raises ModelError where the hidden states of a text are not one vector per token, as in Funnel's encoder."""
    if vectors != tokens:
        raise ModelError(
            f"{config.model_type} gives {vectors} vectors for {tokens} tokens, so their mean would include padding"
        )


def check_encodes(config: PreTrainedConfig, folder: Path) -> None:
    """Raises ModelError for a model without an encoder for the source and a decoder for the target."""
    if not getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{folder}: {config.model_type} models are no encoder–decoders, which task.kind=seq2seq needs; choose a "
            "T5 or BART model, or set task.kind=instruction for a decoder"
        )


def reads_ahead(config: PreTrainedConfig) -> bool:
    """Whether a language model of this config sees the tokens that it predicts."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    can_read_ahead = config.model_type in BIDIRECTIONAL or config.model_type in MASKED
    return can_read_ahead and not getattr(config, "is_decoder", False) and not getattr(config, "causal", False)


def reads_padding(model: Any) -> bool:
    """Whether a row's scores depend on the padding of its batch, so that micro-batches must have rows of one length."""
    return getattr(getattr(model, "config", None), "model_type", None) in READS_PADDING


def padding_note(config: PreTrainedConfig) -> str | None:
    """A note for the user where the scores of a row depend on the padding of its batch."""
    reason = READS_PADDING.get(config.model_type)
    if reason is None:
        return None
    return (
        f"{config.model_type} reads padding through {reason}: micro-batches have rows of one length, which is slower; "
        "where other libraries pad, the scores of a row shift with its batch"
    )
