"""NF4 codes chosen for what a layer reads: GPTQ's rounding (Frantar et al. 2022, arXiv:2210.17323) on QLoRA's grid.

Plain NF4 rounds every weight to the nearest of 16 values by itself. Here the columns of W are rounded one after the
other, and what each loses on the inputs X is made up for by the columns that are still to come, so that ‖(W − Ŵ) X‖²
becomes small in place of ‖W − Ŵ‖². The scale of each block is the one that loses least, each column weighted by Σ x².
Format, bytes and kernels stay bitsandbytes' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LAZY = 128
"""Columns whose corrections to all later ones are added at once (GPTQ's lazy batches)."""
DAMPING = 0.01
"""Share of the mean of Σ x² that is added to each column's, so that the matrix can be inverted (GPTQ's default)."""
ASYMMETRY = 0.7
"""How far ``aimed`` goes: the whole way follows the calibration rows too closely."""
SCALES = torch.linspace(0.6, 1.0, 17).tolist()
"""Shares of a block's largest weight that are tried as its scale."""
OUTER_BLOCK = 256
"""Scales that share a scale of their own under double quantization, as bitsandbytes has it."""


def requantize(layers: Sequence[Any], weights: Sequence[Tensor], gram: Tensor, block_size: int = 64) -> list[Tensor]:
    """Gives 4-bit layers that read the same inputs new codes and scales.

    Args:
        layers: bitsandbytes' ``Linear4bit`` in NF4, quantized already; changed in place.
        weights: their whole weights, [out, in] each.
        gram: X Xᵀ over the inputs they read, [in, in] in fp32.
        block_size: weights that share a scale: 64 as in QLoRA; 32 takes 0.13 bits more for each and loses less.

    Returns:
        The weights as the layers now hold them, [out, in] each, in fp32.
    """
    inverse, order = _inverse(gram)
    for layer in layers:
        layer.weight.blocksize = layer.weight.quant_state.blocksize = block_size
    scales = [
        _rescale(layer.weight.quant_state, weight.float(), gram.diagonal()) for layer, weight in zip(layers, weights)
    ]
    grid = layers[0].weight.quant_state.code.float()
    codes = _codes(torch.cat([weight.float() for weight in weights]), torch.cat(scales), inverse, order, grid)
    held = []
    for layer, scale, own in zip(layers, scales, codes.split([len(weight) for weight in weights])):
        layer.weight.data = _packed(own).view(layer.weight.shape)
        held.append(grid[own.long()] * scale)
    return held


def aimed(weight: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """The weight to round, so that a layer gives on what it reads now what the given one gave on what it read.

    What came before it in the model was quantized, so that it reads x̂ in place of x. ``ASYMMETRY`` of the way from W to
    W (Σ x x̂ᵀ) (Σ x̂ x̂ᵀ)⁻¹, the least-squares answer (GPTAQ, Li et al. 2025, arXiv:2504.02692).

    Args:
        weight: [out, in] in fp32.
        gram: Σ x̂ᵀ x̂ over the tokens, [in, in].
        cross: Σ xᵀ x̂, [in, in].
    """
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    return weight + ASYMMETRY * torch.linalg.solve(damped, (weight @ (cross - gram)).T).T


def _inverse(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse of ``gram``, columns in the order of falling Σ x², and that order."""
    gram = gram.clone()
    seen = gram.diagonal()
    seen[seen == 0] = 1.0  # a column that is always zero loses nothing, whatever its code
    order = seen.argsort(descending=True, stable=True)
    gram = gram[order][:, order]
    damping = DAMPING * seen.mean()
    while True:
        gram.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper, order
        damping = damping * 10


def _codes(weight: Tensor, scale: Tensor, inverse: Tensor, order: Tensor, grid: Tensor) -> Tensor:
    """The code of each weight, uint8 [out, in]: columns in ``order``, each one's loss passed on to those after it."""
    left, scale = weight[:, order], scale[:, order]
    middles = (grid[1:] + grid[:-1]) / 2
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for start in range(0, left.shape[1], LAZY):
        end = min(start + LAZY, left.shape[1])
        block, lost = left[:, start:end].clone(), torch.empty_like(left[:, start:end])
        factor = inverse[start:end, start:end]
        for column in range(end - start):
            code = torch.bucketize(block[:, column] / scale[:, start + column], middles)
            rounded = grid[code] * scale[:, start + column]
            codes[:, start + column] = code.to(torch.uint8)
            lost[:, column] = (block[:, column] - rounded) / factor[column, column]
            block[:, column + 1 :] -= lost[:, column, None] * factor[column, column + 1 :]
        left[:, end:] -= lost @ inverse[start:end, end:]
    return codes[:, order.argsort()]


def _rescale(state: Any, weight: Tensor, importance: Tensor) -> Tensor:
    """Gives a quantization state the scales that lose least; returns the scale of each weight, [out, in]."""
    blocks, weights = as_blocks(weight, state.blocksize), as_blocks(importance.expand_as(weight), state.blocksize)
    grid = state.code.float()
    middles = (grid[1:] + grid[:-1]) / 2
    largest = blocks.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    best, scales = torch.full_like(largest, torch.inf), largest.clone()
    for share in SCALES:
        tried = (largest * share)[:, None]
        lost = ((grid[torch.bucketize(blocks / tried, middles)] * tried - blocks).square() * weights).sum(1)
        better = lost < best
        best, scales = torch.where(better, lost, best), torch.where(better, tried[:, 0], scales)
    scales = double_quantized(state, scales)
    # a scale that double quantization rounded to nothing would divide by zero: its weights are all as good as zero
    each = scales.clamp_min(torch.finfo(torch.float32).tiny).repeat_interleave(state.blocksize)
    return each[: weight.numel()].view(weight.shape)


def scales_of(state: Any) -> Tensor:
    """The scale of each block, [blocks] in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax.float().clone()  # type: ignore[no-any-return]
    return dequantize_blockwise(state.absmax, state.state2) + state.offset  # type: ignore[no-any-return]


def double_quantized(state: Any, scales: Tensor) -> Tensor:
    """Gives a quantization state these scales, [blocks]; returns them as it holds them."""
    from bitsandbytes.functional import quantize_blockwise

    if state.nested:
        state.offset = scales.mean()
        state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=OUTER_BLOCK)
    else:
        state.absmax = scales
    return scales_of(state)


def as_blocks(values: Tensor, size: int) -> Tensor:
    """[blocks, size] of the flattened values, the last block filled up with zeros."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _packed(codes: Tensor) -> Tensor:
    """Two codes to a byte, the first of them in the upper half, as bitsandbytes packs them."""
    flat = codes.reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, len(flat) % 2))
    return (flat[0::2] << 4) | flat[1::2]
