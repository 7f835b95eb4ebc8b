"""How many tokens a model reads: its positions, its tokenizer's own limit, and the recipe's.

Each of the three may be missing or too large. A tokenizer that is loaded by ``peftkit.models.tokenizer`` already
carries the smaller of the first two as its ``model_max_length``, so that ``usable_length`` is all that a caller needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
"""Names of the number of positions, the usual one first."""
AFTER_PAD = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
"""Architectures that count positions from the pad token's id + 1, so that fewer are left for tokens."""
RELATIVE = frozenset({"bloom", "cpmant", "funnel", "longt5", "mt5", "switch_transformers", "t5", "umt5", "xlnet"})
"""Architectures that attend by distance alone, whatever positions an old config.json names."""
FIXED_OFFSET = {"mpnet": 2}
"""Positions before the first token's where they depend on no pad token."""


def usable_length(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """The most tokens of a row: ``data.max_length``, or fewer where the base model reads fewer."""
    return int(min(max_length, tokenizer.model_max_length))


def positions(config: PreTrainedConfig, pad_token_id: int | None = None) -> int | None:
    """The most tokens that a model reads, from its config; None where its architecture has no limit.

    A rotary model computes positions without end, and gets worse beyond those that it was trained with: its limit is
    ``max_position_embeddings``, or what ``rope_parameters`` stretch it to. Relative positions and ALiBi have none.

    Args:
        config: of the whole model.
        pad_token_id: the tokenizer's, which replaces the config's when a model is loaded.
    """
    text: Any = (
        config.get_text_config(decoder=True) if config.model_type in _SEVERAL_TEXTS else config.get_text_config()
    )
    if text.model_type in RELATIVE or getattr(text, "alibi", False) is True:
        return None
    if getattr(text, "relative_attention", False) and not getattr(text, "position_biased_input", True):
        return None  # DeBERTa
    rows = next((rows for name in FIELDS if (rows := _count(getattr(text, name, None)))), None)
    if rows is None:
        return None
    if text.model_type in AFTER_PAD and not _is_rotary(text):
        pad = getattr(text, "pad_token_id", None) if pad_token_id is None else pad_token_id
        return max(1, rows - (pad or 0) - 1)
    return max(1, _stretched(rows, text) - FIXED_OFFSET.get(text.model_type, 0))


def limit_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Lowers a tokenizer's ``model_max_length`` to the positions of the model in the folder.

    A config that cannot be read is left to the loading of the model, which reports it.
    """
    from transformers import AutoConfig

    try:
        limit = positions(AutoConfig.from_pretrained(folder, trust_remote_code=False), _pad_id(tokenizer))
    except Exception:  # odd values break transformers in as many ways as there are values
        return
    if limit is not None and limit < tokenizer.model_max_length:
        tokenizer.init_kwargs.setdefault("model_max_length", tokenizer.model_max_length)  # what it declares
        tokenizer.model_max_length = limit


def _pad_id(tokenizer: Any) -> int | None:
    return tokenizer.pad_token_id  # type: ignore[no-any-return]


_SEVERAL_TEXTS = frozenset({"musicgen", "musicgen_melody"})
"""Architectures with a text encoder besides the decoder."""


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _is_rotary(text: Any) -> bool:
    """Whether an architecture with several kinds of positions uses rotary ones (ESM)."""
    return getattr(text, "position_embedding_type", None) == "rotary"


def _stretched(rows: int, text: Any) -> int:
    """Positions of a rotary model after scaling; some configs name those before it, and some those after."""
    parameters = getattr(text, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return rows
    # one set of parameters, or one per kind of layer
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    stretched = [rows]
    for each in nested or [parameters]:
        factor, original = each.get("factor"), _count(each.get("original_max_position_embeddings"))
        if isinstance(factor, (int, float)) and factor > 1:
            scales_all = each.get("rope_type") in ("linear", "dynamic")
            stretched.append(int((original or (rows if scales_all else 0)) * factor))
    return max(stretched)
