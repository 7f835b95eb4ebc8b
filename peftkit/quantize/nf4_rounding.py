"""GPTQ (Frantar et al. 2022, arXiv:2210.17323) on QLoRA's NF4 grid: rounding that minimizes a layer's output error.

Plain NF4 rounds every weight to the nearest of 16 values. GPTQ rounds the columns of W one after the other, and the
remaining columns compensate for the error of each on the inputs X, so that ‖(W − Ŵ) X‖² is minimized in place of
‖W − Ŵ‖². The scale of each block is searched for the least error, with each column weighted by Σ x².
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LAZY = 128  # columns whose corrections are applied to all later ones at once (GPTQ's lazy batches)
DAMPING = 0.01
"""Fraction of the mean of Σ x² that is added to each column's, so that the matrix can be inverted (GPTQ's default)."""
ASYMMETRY = 0.7  # interpolation of ``asymmetric_target``: 1, the least-squares solution, overfits the calibration rows
SCALES = torch.linspace(0.6, 1.0, 17).tolist()  # fractions of a block's largest weight that are tried as its scale
OUTER_BLOCK = 256  # scales per second-level scale in double quantization, as in bitsandbytes


def requantize(layers: Sequence[Any], weights: Sequence[Tensor], gram: Tensor, block_size: int = 64) -> list[Tensor]:
    """Gives 4-bit layers that read the same inputs new codes and scales.

    Args:
        layers: bitsandbytes' ``Linear4bit`` in NF4, already quantized; changed in place.
        weights: their unquantized weights, [out, in] each.
        gram: X Xᵀ over the inputs, [in, in] in fp32.
        block_size: weights per scale: 64 as in QLoRA; 32 takes 0.13 bits more per weight and has less error.

    Returns:
        The dequantized weights, [out, in] each, in fp32.
    """
    inverse, order = _inverse_cholesky(gram)
    scales = []
    for layer, weight in zip(layers, weights):
        layer.weight.blocksize = layer.weight.quant_state.blocksize = block_size
        scales.append(_search_scales(layer.weight.quant_state, weight.float(), gram.diagonal()))
    grid = layers[0].weight.quant_state.code.float()
    codes = _round(torch.cat([weight.float() for weight in weights]), torch.cat(scales), inverse, order, grid)
    dequantized = []
    for layer, scale, layer_codes in zip(layers, scales, codes.split([len(weight) for weight in weights])):
        pairs = to_blocks(layer_codes, 2)  # two codes per byte, the first in the upper half, as in bitsandbytes
        layer.weight.data = ((pairs[:, 0] << 4) | pairs[:, 1]).view(layer.weight.shape)
        dequantized.append(grid[layer_codes.long()] * scale)
    return dequantized


def asymmetric_target(weight: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """The weight with which a layer gives on x̂ (its inputs in the quantized model) what it gave on x (unquantized).

    ``ASYMMETRY`` of the way from W to the least-squares solution W (Σ x x̂ᵀ) (Σ x̂ x̂ᵀ)⁻¹ (GPTAQ, Li et al. 2025,
    arXiv:2504.02692).

    Args:
        weight: [out, in] in fp32.
        gram: Σ x̂ᵀ x̂ over the tokens, [in, in].
        cross: Σ xᵀ x̂, [in, in].
    """
    return weight + ASYMMETRY * torch.linalg.solve(damped(gram), (weight @ (cross - gram)).T).T


def damped(gram: Tensor) -> Tensor:
    """A copy that is safe to invert."""
    gram = gram.clone()
    gram.diagonal().add_(DAMPING * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    return gram


def _inverse_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse of ``gram``, with columns by decreasing Σ x², and that order."""
    gram = gram.clone()
    squares = gram.diagonal()
    squares[squares == 0] = 1.0  # a column whose inputs are always zero causes no error, whatever its code
    order = squares.argsort(descending=True, stable=True)
    gram = gram[order][:, order]
    damping = DAMPING * squares.mean()
    while True:
        gram.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper, order
        damping = damping * 10


def _round(weight: Tensor, scale: Tensor, inverse: Tensor, order: Tensor, grid: Tensor) -> Tensor:
    """The code of each weight, uint8 [out, in]: rounds columns in ``order``, and later ones compensate for errors."""
    remaining, scale = weight[:, order], scale[:, order]
    midpoints = (grid[1:] + grid[:-1]) / 2
    codes = torch.empty(remaining.shape, dtype=torch.uint8, device=remaining.device)
    for start in range(0, remaining.shape[1], LAZY):
        end = min(start + LAZY, remaining.shape[1])
        block, errors = remaining[:, start:end].clone(), torch.empty_like(remaining[:, start:end])
        factor = inverse[start:end, start:end]
        for column in range(end - start):
            code = torch.bucketize(block[:, column] / scale[:, start + column], midpoints)
            rounded = grid[code] * scale[:, start + column]
            codes[:, start + column] = code.to(torch.uint8)
            errors[:, column] = (block[:, column] - rounded) / factor[column, column]
            block[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
        remaining[:, end:] -= errors @ inverse[start:end, end:]
    return codes[:, order.argsort()]


def _search_scales(state: Any, weight: Tensor, importance: Tensor) -> Tensor:
    """Sets a quantization state's scales to those of least error; returns the scale of each weight, [out, in]."""
    blocks, importances = to_blocks(weight, state.blocksize), to_blocks(importance.expand_as(weight), state.blocksize)
    grid = state.code.float()
    midpoints = (grid[1:] + grid[:-1]) / 2
    largest = blocks.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    least, scales = torch.full_like(largest, torch.inf), largest.clone()
    for fraction in SCALES:
        scale = (largest * fraction)[:, None]
        error = ((grid[torch.bucketize(blocks / scale, midpoints)] * scale - blocks).square() * importances).sum(1)
        better = error < least
        least, scales = torch.where(better, error, least), torch.where(better, scale[:, 0], scales)
    scales = set_scales(state, scales)
    # double quantization may round a scale to zero, which would divide by zero; its weights are all close to zero
    each = scales.clamp_min(torch.finfo(torch.float32).tiny).repeat_interleave(state.blocksize)
    return each[: weight.numel()].view(weight.shape)


def get_scales(state: Any) -> Tensor:
    """The scale of each block of a quantization state, [blocks] in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax.float().clone()  # type: ignore[no-any-return]
    return dequantize_blockwise(state.absmax, state.state2) + state.offset  # type: ignore[no-any-return]


def set_scales(state: Any, scales: Tensor) -> Tensor:
    """Sets the scales of a quantization state, [blocks]; returns them after double quantization."""
    from bitsandbytes.functional import quantize_blockwise

    if state.nested:
        state.offset = scales.mean()
        state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=OUTER_BLOCK)
    else:
        state.absmax = scales
    return get_scales(state)


def to_blocks(values: Tensor, size: int) -> Tensor:
    """The flattened values as [blocks, size], the last block padded with zeros."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
