"""Attention in bf16 on a CPU, with a backward pass that costs what its products cost.

    softmax(s · Q Kᵀ + mask) V

torch's fused kernel for the CPU spends two thirds of its time in the bf16 backward pass on short rows. Here queries are
taken a block at a time, causal blocks read only the keys before them, heads that share keys are one product, and
products are plain matrix products in bf16 with the softmax in fp32: the precision of transformers' eager attention.
The backward pass forms each block's weights anew (FlashAttention's recomputation, Dao et al. 2022, arXiv:2205.14135);
kept are only those of short rows, which are small, and dropout's masks, where there is dropout.

Shape suffixes: B rows times key heads, G query heads a key head, T queries, S keys, D width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftkit.models import dropout
from peftkit.models.packing import underlying

NAME = "peftkit_cpu"
BLOCK = 128
"""Queries taken at a time."""
SHORT = 64
"""Rows of up to as many tokens keep their weights for the backward pass."""


def cpu_attention(model: Any) -> bool:
    """Lets a bf16 model on a CPU that uses sdpa attend through this module; returns whether it does now.

    Nothing else changes: the masks are sdpa's, and every call that this module is not made for goes to sdpa.
    """
    base = underlying(model)
    weight = base.get_input_embeddings().weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or base.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    base.set_attn_implementation(NAME)
    return bool(base.config._attn_implementation == NAME)


@contextlib.contextmanager
def torchs_own(model: Any) -> Iterator[None]:
    """Lets a model attend through torch's kernel for a while, as it does in the hands of a plain reader."""
    base = underlying(model)
    ours = base.config._attn_implementation == NAME
    if ours:
        base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if ours:
            base.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention: query [rows, heads, T, D] → [rows, T, heads, D]."""
    if not _is_ours(query, key, attention_mask, arguments):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **arguments
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = blockwise(query, key, value, attention_mask, causal, scale, dropout)
    return out.transpose(1, 2).contiguous(), None


def _is_ours(query: Tensor, key: Tensor, mask: Tensor | None, arguments: dict[str, Any]) -> bool:
    if torch.compiler.is_compiling():
        return False
    plain = not any(arguments.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    whole_rows = query.shape[2] == key.shape[2] > 1
    shared = mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1)
    return plain and whole_rows and shared and query.device.type == "cpu" and query.dtype == torch.bfloat16


def blockwise(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention over whole rows.

    Args:
        query: [rows, heads, T, D].
        key, value: [rows, key heads, T, D]; the heads are a multiple of the key heads.
        mask: bool, True where a query may look, [rows or 1, 1, T or 1, T]; None for all.
        causal: queries look at themselves and before only; with a mask, the mask says so.
    """
    return _Blockwise.apply(query, key, value, mask, causal, scale, dropout)  # type: ignore[no-any-return]


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, p: float
    ) -> Tensor:
        key, value = key.contiguous(), value.contiguous()
        out = torch.empty(query.shape, dtype=query.dtype)
        dropped, weights = [], None
        with torch.autocast("cpu", enabled=False):
            for first, last, keys in _blocks(query.shape[2], mask, causal):
                weights = _weights(query[:, :, first:last], key[:, :, :keys], mask, causal, scale, first)
                used = _rows(weights).to(value.dtype)
                if p > 0:
                    dropped.append(dropout.mask(used.shape, p, used.dtype))
                    used = used.mul_(dropped[-1]) if used.dtype != weights.dtype else used * dropped[-1]
                block = torch.matmul(used, value[:, :, :keys])
                out[:, :, first:last] = block.view(out[:, :, first:last].shape)
        known = weights if query.shape[2] <= min(SHORT, BLOCK) else None
        ctx.save_for_backward(query, key, value, mask, known, *dropped)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, known, *dropped = ctx.saved_tensors
        blocks = list(_blocks(query.shape[2], mask, ctx.causal))
        # sums over blocks are kept in fp32
        wide = torch.promote_types(key.dtype, torch.float32) if len(blocks) > 1 else key.dtype
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key, dtype=wide)
        grad_value = torch.zeros_like(grad_key)
        for number, (first, last, keys) in enumerate(blocks):
            block, seen = query[:, :, first:last], key[:, :, :keys]
            weights = _weights(block, seen, mask, ctx.causal, ctx.scale, first) if known is None else known
            used, rows = _rows(weights).to(value.dtype), _grouped(grad_out[:, :, first:last], key)
            slope = torch.matmul(rows, value[:, :, :keys].mT)
            if dropped:
                used, slope = used * dropped[number], slope.mul_(dropped[number])
            grad_value[:, :, :keys] += torch.matmul(used.mT, rows)
            slope = slope.view(weights.shape).to(weights.dtype)
            slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
            slope = _rows(slope).to(key.dtype)
            grad_query[:, :, first:last] = torch.matmul(slope, seen).mul_(ctx.scale).view(block.shape)
            grad_key[:, :, :keys] += torch.matmul(slope.mT, _grouped(block, key) * ctx.scale)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


def _blocks(tokens: int, mask: Tensor | None, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first query, last query, keys that are read) of each block."""
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        ahead_unseen = mask is not None and mask.shape[2] > 1 and not bool(mask[:, :, first:last, last:].any())
        yield first, last, last if causal or ahead_unseen else tokens


def _weights(block: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float, first: int) -> Tensor:
    """Softmax of a block of queries in fp32, [rows, key heads, G, queries, keys]."""
    scores = torch.matmul(_grouped(block, key) * scale, key.mT)
    scores = scores.view(*key.shape[:2], -1, block.shape[2], key.shape[2])
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    lowest = torch.finfo(scores.dtype).min  # added, and not filled in, which is several times slower
    if mask is not None:
        piece = mask if mask.shape[2] == 1 else mask[:, :, first : first + block.shape[2]]
        piece = piece[:, :, None, :, : key.shape[2]]
        if not bool(piece.all()):
            scores += torch.zeros(piece.shape, dtype=scores.dtype).masked_fill_(~piece, lowest)
    elif causal:
        scores += scores.new_full(scores.shape[-2:], lowest).triu_(first + 1)
    return scores.softmax(-1)


def _grouped(block: Tensor, key: Tensor) -> Tensor:
    """Queries of the heads that share a key head, one under the other: [rows, key heads, G · queries, D]."""
    return block.reshape(key.shape[0], key.shape[1], -1, block.shape[-1])


def _rows(weights: Tensor) -> Tensor:
    """[rows, key heads, G, queries, keys] → [rows, key heads, G · queries, keys]."""
    return weights.flatten(2, 3)
