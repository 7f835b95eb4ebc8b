"""Several documents in one row without one reading another, and what else a batch need not carry.

A packed row holds documents end to end; its ``position_ids`` start at 0 with each of them. transformers' mask builder
(``masking_utils.find_packed_sequence_indices``) separates them when it is given positions and no attention mask, which
most causal models pass on and some do not. Nothing is assumed here: each loaded model is tried on two tiny rows, and
isolation counts as reached when the logits of every document equal its own alone, and changing one document leaves
the others bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftkit.errors import ModelError

Strategy = Literal["positions", "mask"]
_KEYS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
_LENGTHS = ((5, 3, 4), (2, 6, 4))
"""Document lengths of the two rows that a model is tried on."""


@dataclass
class Abilities:
    """What trials of a loaded model showed; each is made when its answer is first asked for."""

    packing: tuple[Strategy | None, str] | None = None
    """How packed documents are kept apart, and where they cannot be, None and why."""
    padding_is_unseen: bool | None = None
    """Whether the logits of real tokens are the same without an attention mask over padding on the right."""


_ABILITIES: WeakKeyDictionary[nn.Module, Abilities] = WeakKeyDictionary()


def underlying(model: Any) -> Any:
    """The transformers model inside wrappers of distribution, compilation and adapters."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module):  # DistributedDataParallel, FSDP, DeepSpeed
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def assume_supported(model: nn.Module) -> None:
    """Record that a model without data supports packing, since it cannot be tried."""
    _ABILITIES[underlying(model)] = Abilities(("positions", ""), True)


def supports_packing(model: Any) -> tuple[bool, str]:
    """Whether documents packed into one row stay apart in this model, tried on it; and why not."""
    strategy, reason = _packing(model)
    return strategy is not None, reason


def inputs(batch: dict[str, Tensor], model: Any) -> dict[str, Any]:
    """The keyword arguments with which ``model`` reads ``batch``; packed documents are kept apart.

    Only keys that the model takes are passed. An attention mask that covers nothing but padding on the right is left
    out where the model was seen not to need it, because attention is faster without one.

    Raises:
        ModelError: the batch is packed (several positions 0 among a row's real tokens) and the model cannot do it.
    """
    given = {name: batch[name] for name in _KEYS if batch.get(name) is not None and name in _parameters(model)}
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if learned_tokens(model):
        given.pop("position_ids", None)  # the prompt's come first, and peft counts on
    if positions is not None and _is_packed(positions, mask):
        strategy, reason = _packing(model)
        if strategy is None:
            raise ModelError(f"{reason}; use batches by length instead of packed rows")
        given.pop("attention_mask", None)
        if strategy == "mask":
            given["attention_mask"] = _block_mask(positions, underlying(model).dtype)
    elif _only_right_padding(mask) and _padding_is_unseen(model):
        given.pop("attention_mask", None)
        given.pop("position_ids", None)
    return given


def segments(position_ids: Tensor) -> Tensor:
    """Number of the document that each token belongs to, [rows, tokens], from positions that restart at 0."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def _is_packed(positions: Tensor, mask: Tensor | None) -> bool:
    starts = positions == 0
    if mask is not None:
        starts = starts & mask.bool()
    return bool((starts.sum(-1) > 1).any())


def _only_right_padding(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 2 and bool((mask[:, :1] != 0).all() and (mask.diff(dim=-1) <= 0).all())


def _block_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal within a document: 0 where a token may look, the lowest number elsewhere; [rows, 1, tokens, tokens]."""
    document = segments(positions)
    tokens = positions.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=positions.device).tril()
    allowed = (document[:, :, None] == document[:, None, :]) & causal
    mask = torch.zeros(allowed.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def _parameters(model: Any) -> set[str]:
    return set(inspect.signature(type(underlying(model)).forward).parameters)


def _abilities(model: Any) -> Abilities:
    return _ABILITIES.setdefault(underlying(model), Abilities())


def _packing(model: Any) -> tuple[Strategy | None, str]:
    known = _abilities(model)
    if known.packing is None:
        _padding_is_unseen(model)  # processes that share a model's layers try it together, before rows differ
        with eval_modules(model):
            known.packing = _try_packing(model, underlying(model).config.model_type)
    return known.packing


def _padding_is_unseen(model: Any) -> bool:
    known = _abilities(model)
    if known.padding_is_unseen is None:
        with eval_modules(model):  # with a learned prompt, peft needs the row's attention mask, to widen it
            known.padding_is_unseen = not learned_tokens(model) and _try_padding(model)
    return known.padding_is_unseen


def learned_tokens(model: Any) -> int:
    """Vectors that a prompt method puts before every row, as tokens or as keys and values; 0 for all other methods."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if getattr(config, "is_prompt_learning", False) else 0


def _try_packing(model: Any, name: str) -> tuple[Strategy | None, str]:
    if learned_tokens(model):
        return None, f"{name} with a learned prompt reads it before the first document of a row only"
    if "position_ids" not in _parameters(model):
        return None, f"{name} takes no position_ids, so documents in one row cannot be told apart"
    config = underlying(model).config.get_text_config()
    local = getattr(config, "sliding_window", None) or len(set(getattr(config, "layer_types", None) or ())) > 1
    strategies: tuple[Strategy, ...] = ("positions",) if local else ("positions", "mask")
    for strategy in strategies:
        if _keeps_apart(model, strategy):
            return strategy, ""
    return (
        None,
        f"{name} with {config._attn_implementation} attention lets packed documents see each other",
    )


def _keeps_apart(model: Any, strategy: Strategy) -> bool:
    """The trial itself, on two rows at once: some attention kernels tell documents apart in a single row only."""
    ids, positions = _tiny_rows(model)
    try:
        packed = _packed_logits(model, ids, positions, strategy)
        changed = ids.clone()
        first = _LENGTHS[0][0]
        changed[0, :first] = (ids[0, :first] + 1) % int(ids.max())
        after = _packed_logits(model, changed, positions, strategy)
        if not torch.equal(packed[0, first:], after[0, first:]) or not torch.equal(packed[1], after[1]):
            return False
        return all(_close(packed[row, a:b], _logits(model, ids[row : row + 1, a:b])[0]) for row, a, b in _documents())
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False  # a mask or positions of a shape that this architecture does not know


def _packed_logits(model: Any, ids: Tensor, positions: Tensor, strategy: Strategy) -> Tensor:
    mask = {"attention_mask": _block_mask(positions, underlying(model).dtype)} if strategy == "mask" else {}
    return _logits(model, ids, position_ids=positions, **mask)


def _documents() -> Iterator[tuple[int, int, int]]:
    for row, lengths in enumerate(_LENGTHS):
        start = 0
        for length in lengths:
            yield row, start, start + length
            start += length


def _try_padding(model: Any) -> bool:
    ids, _ = _tiny_rows(model)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    bare, masked = _logits(model, ids), _logits(model, ids, attention_mask=mask)
    other = ids.clone()
    other[1, -4:] = (ids[1, -4:] + 1) % int(ids.max())
    same = torch.equal(_logits(model, other)[1, :-4], bare[1, :-4])
    return same and _close(bare[0], masked[0]) and _close(bare[1, :-4], masked[1, :-4])


def _tiny_rows(model: Any) -> tuple[Tensor, Tensor]:
    """Token ids spread over the vocabulary and positions that restart, both [2, 12]."""
    embedding = underlying(model).get_input_embeddings().weight
    vocabulary = underlying(model).config.get_text_config().vocab_size
    count = sum(_LENGTHS[0])
    ids = (torch.arange(2 * count, device=embedding.device) * 7919 + 13) % vocabulary
    positions = [[p for length in row for p in range(length)] for row in _LENGTHS]
    return ids.view(2, count), torch.tensor(positions, device=embedding.device)


def _logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **arguments, **no_cache(model)).logits.float()


def no_cache(model: Any) -> dict[str, bool]:
    """``use_cache=False`` for models that take it: training never reads the keys and values again."""
    return {"use_cache": False} if "use_cache" in _parameters(model) else {}


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of half precision; that nothing leaks is for the bit-for-bit comparison to say."""
    return bool((a - b).abs().max() < 0.1 * b.std().clamp_min(1e-6))


@contextmanager
def eval_modules(model: nn.Module) -> Iterator[None]:
    """No dropout and no noise inside, and each module's mode restored afterwards.

    4-bit layers keep their mode: bitsandbytes repacks their weights for inference, without a backward pass, as soon
    as they see an evaluation on a CPU.
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
