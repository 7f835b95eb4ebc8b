"""Blockwise attention on a CPU, with a backward pass that costs little more than its matmuls.

    softmax(s · Q Kᵀ + mask) V

On short rows, torch's fused CPU kernel spends two thirds of its time in the bf16 backward pass, and it has no dropout,
with which torch writes all weights to memory several times. So this module serves bf16, and fp32 with dropout. It
processes queries in blocks; causal blocks only read the keys up to their own end, heads that share keys are one matmul,
and matmuls are in the inputs' dtype with the softmax in fp32, the precision of transformers' eager attention. Few rows
are processed at a time, so that the weights of a tile stay in the processor's cache. The backward pass recomputes each
block's weights (as in FlashAttention, Dao et al. 2022, arXiv:2205.14135); only those of short rows and dropout masks
are saved.

Shape suffixes: B rows × key heads, G query heads per key head, T queries, S keys, D head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftkit.models.blocks import unwrap
from peftkit.models.kernels import dropout

NAME = "peftkit_cpu"
DTYPES = (torch.bfloat16, torch.float32)
BLOCK = 128  # queries per tile
TILE = 1 << 20  # most attention weights per tile, unless one row's block has more
MAX_SAVED = 2
"""Attention weights (fp32) are saved for the backward pass if there are at most this many per number in the queries."""


def use_cpu_attention(model: Any) -> bool:
    """Switches a bf16 or fp32 model on a CPU from sdpa to this module; returns whether it was switched.

    Masks stay those of sdpa, and sdpa still serves every call that this module does not support.
    """
    base = unwrap(model)
    weight = next(base.parameters())  # of the embeddings, usually: CANINE, which hashes characters, has several
    supported = weight.device.type == "cpu" and weight.dtype in DTYPES
    if not supported or base.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    base.set_attn_implementation(NAME)
    return bool(base.config._attn_implementation == NAME)


@contextlib.contextmanager
def torch_attention(model: Any) -> Iterator[None]:
    """A context in which the model uses torch's own kernel, as it does without peftkit."""
    base = unwrap(model)
    if base.config._attn_implementation != NAME:
        yield
        return
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
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
    """transformers' attention interface: query [rows, heads, T, D] → [rows, T, heads, D]."""
    if torch.compiler.is_compiling() or not _is_supported(query, key, attention_mask, dropout, arguments):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **arguments
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return blockwise(query, key, value, attention_mask, bool(causal) and attention_mask is None, scale, dropout), None


def _is_supported(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, arguments: dict[str, Any]) -> bool:
    # in fp32 torch's fused kernel is fast, but does not support dropout
    served = query.dtype == torch.bfloat16 or (query.dtype == torch.float32 and dropout > 0)
    if not served or query.device.type != "cpu":
        return False
    plain = not any(arguments.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    full_rows = query.shape[2] == key.shape[2] > 1
    same_for_heads = mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1)
    return plain and full_rows and same_for_heads


def blockwise(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention over full rows, [rows, T, heads, D].

    Args:
        query: [rows, heads, T, D].
        key, value: [rows, key heads, T, D]; the number of heads is a multiple of the key heads.
        mask: bool, True where attention is allowed, [rows or 1, 1, T or 1, T]; None allows all.
        causal: whether queries only see keys up to their own position; False with a mask.
    """
    return _Blockwise.apply(query, key, value, mask, causal, scale, dropout)  # type: ignore[no-any-return]


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, p: float
    ) -> Tensor:
        key, value = key.contiguous(), value.contiguous()
        out = query.new_empty([query.shape[i] for i in (0, 2, 1, 3)])
        query_KTGD = _by_key_head(query, key, scale)
        added = None if mask is None else _added(mask, key.dtype)
        tiles, save_weights = _tiles(query, mask, causal)
        dropout_masks, saved = [], []
        with torch.autocast("cpu", enabled=False):
            for tile in tiles:
                weights = _weights(query_KTGD, key, added, causal, tile)
                rounded = weights.to(value.dtype)
                if p > 0:
                    dropout_masks.append(dropout.mask(rounded.shape, p, rounded.dtype))
                    rounded = rounded * dropout_masks[-1]
                _write(out, tile, torch.bmm(rounded, tile.keys(value)))
                if save_weights:
                    saved.append(weights)
        ctx.save_for_backward(query_KTGD, key, value, added, *saved, *dropout_masks)
        ctx.tiles, ctx.causal, ctx.scale, ctx.saved = tiles, causal, scale, len(saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query_KTGD, key, value, added, *others = ctx.saved_tensors
        saved, dropout_masks, tiles = others[: ctx.saved], others[ctx.saved :], ctx.tiles
        grad_out_KTGD, grad_query = _by_key_head(grad_out.transpose(1, 2), key), torch.empty_like(grad_out)
        # sums over several blocks of queries are in fp32
        wide = torch.promote_types(key.dtype, torch.float32) if tiles[0].first < tiles[-1].first else key.dtype
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for index, tile in enumerate(tiles):
            weights = saved[index] if saved else _weights(query_KTGD, key, added, ctx.causal, tile)
            rounded = weights.to(value.dtype)
            rows = tile.queries(grad_out_KTGD)
            grad = torch.bmm(rows, tile.keys(value).mT)  # by the weights, then by the scores
            if dropout_masks:
                rounded, grad = rounded * dropout_masks[index], grad.mul_(dropout_masks[index])
            grad = torch._softmax_backward_data(grad.to(weights.dtype), weights, -1, weights.dtype).to(key.dtype)
            _write(grad_query, tile, torch.bmm(grad, tile.keys(key)).mul_(ctx.scale))
            tile.keys(grad_value).add_(torch.bmm(rounded.mT, rows))
            tile.keys(grad_key).add_(torch.bmm(grad.mT, tile.queries(query_KTGD)))
        return grad_query.transpose(1, 2), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


class _Tile(NamedTuple):
    """A block of queries of some rows, with the number of keys that they see."""

    rows: slice
    first: int
    last: int
    seen: int

    def queries(self, tensor_KTGD: Tensor) -> Tensor:
        """The tile's part of [rows, key heads, T, G, D], as [rows · key heads, queries · G, D]."""
        return tensor_KTGD[self.rows, :, self.first : self.last].flatten(2, 3).flatten(0, 1)

    def keys(self, tensor_KSD: Tensor) -> Tensor:
        """The tile's part of [rows, key heads, S, D], as [rows · key heads, keys, D]."""
        return tensor_KSD[self.rows].flatten(0, 1)[:, : self.seen]


def _tiles(query: Tensor, mask: Tensor | None, causal: bool) -> tuple[list[_Tile], bool]:
    """The tiles of an attention, and whether their weights are saved for the backward pass."""
    (count, heads, tokens, width), tiles, weights = query.shape, [], 0
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        ahead_unseen = mask is not None and mask.shape[2] > 1 and not bool(mask[:, :, first:last, last:].any())
        seen = last if causal or ahead_unseen else tokens
        rows = max(1, TILE // (heads * (last - first) * seen))
        tiles += [_Tile(slice(row, row + rows), first, last, seen) for row in range(0, count, rows)]
        weights += (last - first) * seen
    return tiles, weights <= MAX_SAVED * tokens * width


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The additive form of a mask (several times faster than ``masked_fill``), None if it masks nothing; cached."""
    forms = _ADDITIVE_MASKS.setdefault(mask, {})
    if dtype not in forms:
        zeros = torch.zeros(mask.shape, dtype=dtype)
        forms[dtype] = None if bool(mask.all()) else zeros.masked_fill_(~mask, torch.finfo(dtype).min)
    return forms[dtype]


_ADDITIVE_MASKS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Additive forms by dtype, of the masks that are alive."""


def _weights(query_KTGD: Tensor, key: Tensor, added: Tensor | None, causal: bool, tile: _Tile) -> Tensor:
    """A tile's attention weights in fp32, [rows · key heads, queries · G, keys]."""
    scores = torch.bmm(tile.queries(query_KTGD), tile.keys(key).mT)
    queries = tile.last - tile.first
    split = scores.view(-1, key.shape[1], queries, query_KTGD.shape[3], tile.seen)
    if added is not None:
        added = added[tile.rows] if len(added) > 1 else added
        added = added if added.shape[2] == 1 else added[:, :, tile.first : tile.last]
        split += added[:, :, :, None, : tile.seen]
    elif causal:
        lowest = torch.finfo(scores.dtype).min
        split[..., tile.first :] += split.new_full((queries, queries), lowest).triu_(1)[:, None]
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


def _by_key_head(tensor: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """[rows, heads, T, D] → [rows, key heads, T, G, D]: queries that share a key head are adjacent, by token."""
    rows, heads, tokens, width = tensor.shape
    view = tensor.view(rows, key.shape[1], heads // key.shape[1], tokens, width).transpose(2, 3)
    return view.contiguous() if scale == 1.0 else torch.mul(view, scale, out=view.new_empty(view.shape))


def _write(output: Tensor, tile: _Tile, part: Tensor) -> None:
    """Writes a tile's queries, [rows · key heads, queries · G, D], into [rows, T, heads, D]."""
    view = output[tile.rows, tile.first : tile.last]
    rows, queries, heads, width = view.shape
    group = part.shape[1] // queries
    part = part.view(rows, heads // group, queries, group, width).transpose(1, 2)
    view.view(rows, queries, heads // group, group, width).copy_(part)
