"""Computes only the first token in the last block of an encoder whose head reads nothing else.

The last block needs keys and values at every token, but query, output projection and feed-forward network only where
their result is read. BERT, RoBERTa, ELECTRA and similar models classify by the first token (Devlin et al. 2019,
arXiv:1810.04805, section 3.2). Skipping the other tokens saves ten twelfths of a block's matmuls: 14 % of a model of
six blocks, 7 % of one of twelve, forward and backward. Outside ``reading_first_token`` the block computes every token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.errors import ModelError
from peftkit.models.blocks import find_blocks, unwrap
from peftkit.models.packing import eval_modules

ACTIVE: ContextVar[bool] = ContextVar("ACTIVE", default=False)
ATTENTIONS = ("eager", "sdpa", "peftkit_cpu")  # attention implementations with masks of [rows, 1, queries, keys]
HALF = (torch.bfloat16, torch.float16)
TOLERANCE = 3e-2
"""Largest difference of scores in the trial, relative to the largest score; half precision rounds coarsely."""


@contextlib.contextmanager
def reading_first_token() -> Iterator[None]:
    """A context in which only the first token of the last block's output is read."""
    token = ACTIVE.set(True)
    try:
        yield
    finally:
        ACTIVE.reset(token)


def supports_checkpointing() -> bool:
    """Whether a shortened block can be checkpointed.

    Older versions of transformers (5.17) checkpoint a block's call, not its ``forward``, and recompute it outside of
    ``reading_first_token``.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" not in vars(GradientCheckpointingLayer)


def shorten_last_block(model: nn.Module) -> bool:
    """Makes a (wrapped) classifier's last block compute only the first token, if a trial gives the same scores."""
    inner: Any = unwrap(model)
    try:
        last: Any = find_blocks(inner)[1][-1]
    except ModelError:
        return False
    if not _is_known(last) or inner.config._attn_implementation not in ATTENTIONS or "forward" in vars(last):
        return False
    last.forward = MethodType(_forward, last)  # its class stays the same as that of the other blocks
    same = _same_scores(inner)
    if not same:
        del last.forward
    return same


def _is_known(block: Any) -> bool:
    """Whether a block has the parts of BERT's."""
    attention = getattr(block, "attention", None)
    own = getattr(attention, "self", None)
    parts = [getattr(own, name, None) for name in ("query", "key", "value")]
    parts += [getattr(attention, "output", None), getattr(block, "intermediate", None), getattr(block, "output", None)]
    known = all(isinstance(part, nn.Module) for part in parts) and hasattr(own, "attention_head_size")
    return known and hasattr(own, "scaling") and not getattr(block, "is_decoder", False)


def _forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
    simple_mask = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4)
    others = [*args, *(kwargs.get(name) for name in ("encoder_hidden_states", "past_key_values"))]
    if ACTIVE.get() and simple_mask and all(value is None for value in others):
        if self.training and getattr(self, "gradient_checkpointing", False):  # checkpointing wraps the class's forward
            return self._gradient_checkpointing_func(partial(_first, self), hidden_states, attention_mask)
        return _first(self, hidden_states, attention_mask)
    return type(self).forward(self, hidden_states, attention_mask, *args, **kwargs)


def _first(block: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The block's output at the first token, [rows, 1, width]."""
    own, first = block.attention.self, hidden[:, :1]

    def heads(states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], -1, own.attention_head_size).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        heads(own.query(first)), heads(own.key(hidden)), heads(own.value(hidden)),
        attn_mask=None if mask is None else mask[:, :, :1], dropout_p=own.dropout.p if block.training else 0.0,
        scale=own.scaling,
    )  # fmt: skip
    attended = block.attention.output(out.transpose(1, 2).flatten(2), first)
    return block.output(block.intermediate(attended), attended)  # type: ignore[no-any-return]


@torch.no_grad()
def _same_scores(model: Any) -> bool:
    """Compares both ways on a few tokens, with one padded row."""
    device = next(model.parameters()).device
    ids = torch.arange(14).view(2, 7) % (getattr(model.config, "vocab_size", 14) - 1) + 1
    mask = torch.ones_like(ids)
    mask[-1, 3:] = 0
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    dtype = model.get_input_embeddings().weight.dtype
    try:
        with eval_modules(model), torch.autocast(device.type, dtype=dtype, enabled=dtype in HALF):
            expected = model(**inputs).logits.float()
            with reading_first_token():
                scores = model(**inputs).logits.float()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    tolerance = TOLERANCE * expected.abs().max().clamp(min=1e-6)
    return scores.shape == expected.shape and bool((scores - expected).abs().max() <= tolerance)
