"""Packing several documents into one row without one attending to another, and leaving out needless attention masks.

A packed row holds documents end to end; its ``position_ids`` restart at 0 with each of them. transformers' mask builder
(``masking_utils.find_packed_sequence_indices``) separates the documents if it gets positions and no attention mask, but
not every model passes positions on. So each loaded model is tried on two tiny rows: each document must have the logits
it has alone, and changing one document must leave the others unchanged bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftkit.errors import ModelError
from peftkit.models.blocks import forward_parameters, unwrap

Strategy = Literal["positions", "mask"]
_KEYS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
_SOURCE_AND_TARGET = ("input_ids", "attention_mask", "decoder_input_ids")
_DOCUMENTS = ((0, 0, 5), (0, 5, 8), (0, 8, 12), (1, 0, 2), (1, 2, 8), (1, 8, 12))
"""Row, start and end of the documents in the two rows of the trial."""


@dataclass
class PackingSupport:
    """What a loaded model was seen to support; each field is None until its trial."""

    packing: tuple[Strategy | None, str] | None = None
    """How packed documents are isolated, or None and the reason why they cannot be."""
    ignores_right_padding: bool | None = None
    """Whether real tokens have the same logits without an attention mask over padding on the right."""


_SUPPORT: WeakKeyDictionary[nn.Module, PackingSupport] = WeakKeyDictionary()


def assume_supported(model: Any) -> None:
    """Skips the trials: the model is taken to isolate documents by positions and to ignore padding on the right."""
    _SUPPORT[unwrap(model)] = PackingSupport(("positions", ""), True)


def supports_packing(model: Any) -> tuple[bool, str]:
    """Whether this model isolates the documents of a packed row, and the reason if it does not."""
    strategy, reason = _packing(model)
    return strategy is not None, reason


def inputs(batch: dict[str, Tensor], model: Any) -> dict[str, Any]:
    """The keyword arguments for running ``model`` on ``batch``, with packed documents isolated.

    Only arguments that the model takes are passed. An attention mask that only covers padding on the right is left out
    if the model does not need it, because attention is faster without one.

    Raises:
        ModelError: rows are packed (have several tokens at position 0), and the model cannot isolate documents.
    """
    if "decoder_input_ids" in batch:  # an encoder must be shown where a padded text ends
        return {name: batch[name] for name in _SOURCE_AND_TARGET if name in batch}
    names = forward_parameters(model)
    arguments = {name: batch[name] for name in _KEYS if batch.get(name) is not None and name in names}
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if learned_tokens(model):
        arguments.pop("position_ids", None)  # peft numbers positions from the learned prompt on
    if positions is not None and _is_packed(positions, mask):
        strategy, reason = _packing(model)
        if strategy is None:
            raise ModelError(f"{reason}; use batches by length instead of packed rows")
        arguments.pop("attention_mask", None)
        if strategy == "mask":
            arguments["attention_mask"] = _block_mask(positions, unwrap(model).dtype)
    elif _only_right_padding(mask) and _ignores_right_padding(model):
        arguments.pop("attention_mask", None)
        arguments.pop("position_ids", None)
    return arguments


def segments(position_ids: Tensor) -> Tensor:
    """Index of each token's document, [rows, tokens], from positions that restart at 0."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def _is_packed(positions: Tensor, mask: Tensor | None) -> bool:
    starts = positions == 0 if mask is None else (positions == 0) & mask.bool()
    return bool((starts.sum(-1) > 1).any())


def _only_right_padding(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 2 and bool((mask[:, :1] != 0).all() and (mask.diff(dim=-1) <= 0).all())


def _block_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal mask within documents: 0 where attention is allowed, else the lowest number; [rows, 1, tokens, tokens]."""
    document = segments(positions)
    allowed = (document[:, :, None] == document[:, None, :]).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def _packing(model: Any) -> tuple[Strategy | None, str]:
    support = _SUPPORT.setdefault(unwrap(model), PackingSupport())
    if support.packing is None:
        _ignores_right_padding(model)  # processes that shard a model must run both trials at the same time
        with eval_modules(model):
            support.packing = _try_packing(model)
    return support.packing


def _ignores_right_padding(model: Any) -> bool:
    support = _SUPPORT.setdefault(unwrap(model), PackingSupport())
    if support.ignores_right_padding is None:
        with eval_modules(model):  # with a learned prompt, peft needs the row's attention mask, to widen it
            support.ignores_right_padding = not learned_tokens(model) and _try_padding(model)
    return support.ignores_right_padding


def learned_tokens(model: Any) -> int:
    """Number of vectors that a prompt method puts before every row, as tokens or as keys and values; else 0."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if getattr(config, "is_prompt_learning", False) else 0


def _try_packing(model: Any) -> tuple[Strategy | None, str]:
    name = unwrap(model).config.model_type
    if learned_tokens(model):
        return None, f"{name} with a learned prompt reads it before the first document of a row only"
    if "position_ids" not in forward_parameters(model):
        return None, f"{name} takes no position_ids, so documents in one row cannot be separated"
    config = unwrap(model).config.get_text_config()
    local = getattr(config, "sliding_window", None) or len(set(getattr(config, "layer_types", None) or ())) > 1
    if _isolates(model, "positions"):
        return "positions", ""
    if not local and _isolates(model, "mask"):
        return "mask", ""
    return None, f"{name} with {config._attn_implementation} attention lets packed documents see each other"


def _isolates(model: Any, strategy: Strategy) -> bool:
    """Tries a strategy on two rows at once: some attention kernels isolate documents in a single row only."""
    ids, positions = _tiny_rows(model)
    arguments = {"position_ids": positions}
    if strategy == "mask":
        arguments["attention_mask"] = _block_mask(positions, unwrap(model).dtype)
    try:
        packed = _logits(model, ids, **arguments)
        changed, first = ids.clone(), _DOCUMENTS[0][2]
        changed[0, :first] = (ids[0, :first] + 1) % int(ids.max())
        after = _logits(model, changed, **arguments)
        if not torch.equal(packed[0, first:], after[0, first:]) or not torch.equal(packed[1], after[1]):
            return False
        return all(_close(packed[row, a:b], _logits(model, ids[row : row + 1, a:b])[0]) for row, a, b in _DOCUMENTS)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False  # the architecture does not support such a mask or such positions


def _try_padding(model: Any) -> bool:
    ids, _ = _tiny_rows(model)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    unmasked, masked = _logits(model, ids), _logits(model, ids, attention_mask=mask)
    changed = ids.clone()
    changed[1, -4:] = (ids[1, -4:] + 1) % int(ids.max())
    same = torch.equal(_logits(model, changed)[1, :-4], unmasked[1, :-4])
    return same and _close(unmasked[0], masked[0]) and _close(unmasked[1, :-4], masked[1, :-4])


def _tiny_rows(model: Any) -> tuple[Tensor, Tensor]:
    """Token ids spread over the vocabulary and positions that restart, both [2, 12]."""
    embedding = unwrap(model).get_input_embeddings().weight
    vocabulary = unwrap(model).config.get_text_config().vocab_size
    ids = (torch.arange(24, device=embedding.device) * 7919 + 13) % vocabulary
    positions = torch.cat([torch.arange(end - start, device=embedding.device) for _, start, end in _DOCUMENTS])
    return ids.view(2, 12), positions.view(2, 12)


def _logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **arguments, **no_cache(model)).logits.float()


def no_cache(model: Any) -> dict[str, bool]:
    """``use_cache=False`` for models that take it: training does not reuse keys and values."""
    return {"use_cache": False} if "use_cache" in forward_parameters(model) else {}


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to half-precision rounding."""
    return bool((a - b).abs().max() < 0.1 * b.std().clamp_min(1e-6))


@contextmanager
def eval_modules(model: nn.Module) -> Iterator[None]:
    """A context without dropout and noise; each module's mode is restored afterwards.

    bitsandbytes' layers keep their mode: in evaluation on a CPU, 4-bit weights are repacked, without a backward pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        if not type(module).__module__.startswith("bitsandbytes"):
            module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
