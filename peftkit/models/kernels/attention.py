"""Attention in bf16 on a CPU, with a backward pass that costs what its products cost.

    softmax(s · Q Kᵀ + mask) V

torch's fused kernel for the CPU spends two thirds of its time in the bf16 backward pass on short rows. Here queries are
taken a block at a time, causal blocks read only the keys before them, heads that share keys are one product, and
products are plain matrix products in bf16 with the softmax in fp32, which is the precision of
transformers' eager attention. Rows are taken few at a time, so that a tile's weights stay in the processor's cache:
fresh memory for all of them at once costs several times their products.
The backward pass forms each block's weights anew (FlashAttention's recomputation, Dao et al. 2022, arXiv:2205.14135);
kept are only those of short rows, which are small, and dropout's masks, where there is dropout.

Shape suffixes: B rows times key heads, G query heads a key head, T queries, S keys, D width of a head.
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

from peftkit.models.kernels import dropout
from peftkit.models.packing import underlying

NAME = "peftkit_cpu"
BLOCK = 128
"""Queries taken at a time."""
TILE = 1 << 20
"""Weights taken at a time, where a row's block has fewer."""
KEPT = 2
"""Weights, in fp32, are kept for the backward pass where they are up to so many times as many as the queries."""


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
    return blockwise(query, key, value, attention_mask, causal, scale, dropout), None


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
    """Attention over whole rows, [rows, T, heads, D].

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
        out = query.new_empty([query.shape[i] for i in (0, 2, 1, 3)])
        query_KTGD = _by_key_head(query, key, scale)
        added = None if mask is None else _added(mask, key.dtype)
        tiles, keep = _tiles(query, mask, causal)
        dropped, known = [], []
        with torch.autocast("cpu", enabled=False):
            for tile in tiles:
                weights = _weights(query_KTGD, key, added, causal, tile)
                used = weights.to(value.dtype)
                if p > 0:
                    dropped.append(dropout.mask(used.shape, p, used.dtype))
                    used = used * dropped[-1]
                _put(out, tile, torch.bmm(used, tile.keys(value)))
                if keep:
                    known.append(weights)
        ctx.save_for_backward(query_KTGD, key, value, added, *known, *dropped)
        ctx.tiles, ctx.causal, ctx.scale, ctx.known = tiles, causal, scale, len(known)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query_KTGD, key, value, added, *kept = ctx.saved_tensors
        known, dropped, tiles = kept[: ctx.known], kept[ctx.known :], ctx.tiles
        grad_out_KTGD, grad_query = _by_key_head(grad_out.transpose(1, 2), key), torch.empty_like(grad_out)
        # sums over blocks of queries are kept in fp32
        wide = torch.promote_types(key.dtype, torch.float32) if tiles[0].first < tiles[-1].first else key.dtype
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for number, tile in enumerate(tiles):
            weights = known[number] if known else _weights(query_KTGD, key, added, ctx.causal, tile)
            used = weights.to(value.dtype)
            rows = tile.queries(grad_out_KTGD)
            slope = torch.bmm(rows, tile.keys(value).mT)
            if dropped:
                used, slope = used * dropped[number], slope.mul_(dropped[number])
            slope = torch._softmax_backward_data(slope.to(weights.dtype), weights, -1, weights.dtype).to(key.dtype)
            _put(grad_query, tile, torch.bmm(slope, tile.keys(key)).mul_(ctx.scale))
            tile.keys(grad_value).add_(torch.bmm(used.mT, rows))
            tile.keys(grad_key).add_(torch.bmm(slope.mT, tile.queries(query_KTGD)))
        return grad_query.transpose(1, 2), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


class _Tile(NamedTuple):
    """Some queries of some rows, with the keys that they may see."""

    rows: slice
    first: int
    last: int
    seen: int

    def queries(self, tensor_KTGD: Tensor) -> Tensor:
        """Those of [rows, key heads, T, G, D], as [rows · key heads, queries · G, D]."""
        return tensor_KTGD[self.rows, :, self.first : self.last].flatten(2, 3).flatten(0, 1)

    def keys(self, tensor_KSD: Tensor) -> Tensor:
        """Those of [rows, key heads, S, D], as [rows · key heads, keys, D]."""
        return tensor_KSD[self.rows].flatten(0, 1)[:, : self.seen]


def _tiles(query: Tensor, mask: Tensor | None, causal: bool) -> tuple[list[_Tile], bool]:
    """Tiles of an attention, and whether their weights are kept for the backward pass."""
    (count, heads, tokens, width), tiles, weights = query.shape, [], 0
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        ahead_unseen = mask is not None and mask.shape[2] > 1 and not bool(mask[:, :, first:last, last:].any())
        seen = last if causal or ahead_unseen else tokens
        rows = max(1, TILE // (heads * (last - first) * seen))
        tiles += [_Tile(slice(row, row + rows), first, last, seen) for row in range(0, count, rows)]
        weights += (last - first) * seen
    return tiles, weights <= KEPT * tokens * width


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is added to a mask's scores, None where all may be seen; made once for all layers that share a mask.

    Adding is several times faster than filling in.
    """
    known = _ADDED.setdefault(mask, {})
    if dtype not in known:
        lowest, made = torch.finfo(dtype).min, torch.zeros(mask.shape, dtype=dtype)
        known[dtype] = None if bool(mask.all()) else made.masked_fill_(~mask, lowest)
    return known[dtype]


_ADDED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What was made of the masks that are alive."""


def _weights(query_KTGD: Tensor, key: Tensor, added: Tensor | None, causal: bool, tile: _Tile) -> Tensor:
    """Softmax of a tile in fp32, [rows · key heads, queries · G, keys]."""
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
    """[rows, heads, T, D] → [rows, key heads, T, G, D]: queries that share a key head lie together, token by token."""
    rows, heads, tokens, width = tensor.shape
    view = tensor.view(rows, key.shape[1], heads // key.shape[1], tokens, width).transpose(2, 3)
    return view.contiguous() if scale == 1.0 else torch.mul(view, scale, out=view.new_empty(view.shape))


def _put(whole: Tensor, tile: _Tile, part: Tensor) -> None:
    """Puts a tile's queries, [rows · key heads, queries · G, D], into [rows, T, heads, D]."""
    view = whole[tile.rows, tile.first : tile.last]
    rows, queries, heads, width = view.shape
    group = part.shape[1] // queries
    part = part.view(rows, heads // group, queries, group, width).transpose(1, 2)
    view.view(rows, queries, heads // group, group, width).copy_(part)
