"""Quantized linear layers without data, for planning: the bytes, matmuls and saved tensors of bitsandbytes' layers.

    NF4   ½ byte per weight; a 4-byte scale per block of 64, or (double) a 1-byte scale, and 4 bytes per 256 of them
    INT8  1 byte per weight, a 4-byte scale per row

Forward and backward each dequantize the weight to the compute dtype and free it again. INT8 saves its input for the
backward pass, the 4-bit matmul nothing (since bitsandbytes 0.43.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from peftkit.models.quantization.bitsandbytes_support import is_installed
from peftkit.models.quantization.stored import WeightFormat

SCALES, TABLES = "scales", "tables"
"""Names of a layer's buffers. Lookup tables are not persistent: they stay on the device when blocks are offloaded."""


def replace_linear(model: nn.Module, weight_format: WeightFormat, dtype: torch.dtype, skipped: Sequence[str]) -> None:
    """Replaces the linear layers that transformers would quantize, except those in ``skipped``, by layers without data.

    Their weights are multiplied in ``dtype``.
    """
    patterns = list(skipped) or None
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D)) and should_convert_module(name, patterns):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _meta_layer(module, weight_format, dtype))
    # methods check this attribute, which transformers sets on a quantized model
    setattr(model, "is_loaded_in_4bit" if weight_format.kind == "nf4" else "is_loaded_in_8bit", True)


def _meta_layer(linear: Any, weight_format: WeightFormat, dtype: torch.dtype) -> nn.Module:
    rows, columns = linear.weight.shape if isinstance(linear, nn.Linear) else linear.weight.T.shape
    nf4, cls = weight_format.kind == "nf4", _layer_class(weight_format.kind)
    with torch.no_grad():
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = columns, rows
        size = (weight_format.weight_bytes(rows * columns), 1) if nf4 else (rows, columns)
        weight: Any = nn.Parameter(torch.empty(size, dtype=torch.uint8 if nf4 else torch.int8), requires_grad=False)
        weight.quant_type, weight.compress_statistics = weight_format.kind, weight_format.double
        if nf4:
            weight.quant_state = SimpleNamespace(shape=torch.Size((rows, columns)), quant_type="nf4", dtype=dtype)
        layer.weight = weight
        for name, constants in zip((SCALES, f"nested_{SCALES}"), weight_format.scale_bytes(rows, columns)):
            layer.register_buffer(name, torch.empty(constants, dtype=torch.uint8))
        layer.register_buffer(TABLES, torch.empty(weight_format.table_bytes, dtype=torch.uint8), persistent=False)
        layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        layer.weight_format, layer.compute_dtype = weight_format, dtype
        layer.quant_state = getattr(weight, "quant_state", None)
        layer.state = SimpleNamespace(has_fp16_weights=False, threshold=6.0)
        layer.index = None
    return layer


def _layer_class(kind: str) -> Any:
    """A subclass of bitsandbytes' layer where that is installed, so that methods recognize it."""
    base: Any = nn.Linear
    if is_installed():
        import bitsandbytes as bnb

        base = bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt
    own = {"dequantize_weight": lambda self, dtype: _dequantized(self.weight, self.in_features, dtype)}
    return type("Meta" + base.__name__, (base,), {"forward": _forward, **(own if kind == "nf4" else {})})


def _forward(self: Any, x: Tensor) -> Tensor:
    nf4, dtype = self.weight_format.kind == "nf4", x.dtype
    device = "cpu" if x.is_meta else x.device.type  # the meta device has no autocast
    if nf4:
        x = x.to(self.compute_dtype)
    elif torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        out: Tensor = _QuantizedMatmul.apply(x, self.weight, self.in_features, nf4)
        if self.bias is not None:
            out = out.add_(self.bias.to(out.dtype))
    return out.to(dtype) if nf4 else out


class _QuantizedMatmul(torch.autograd.Function):
    """x Wᵀ with W dequantized for each pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, columns: int, nf4: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.columns, ctx.saved = columns, None if nf4 else x
        return torch.nn.functional.linear(x, _dequantized(weight, columns, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return torch.matmul(grad, _dequantized(weight, ctx.columns, grad.dtype)), None, None, None


def _dequantized(weight: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    numbers = weight.numel() * (2 if weight.dtype == torch.uint8 else 1)
    return torch.empty(numbers // columns, columns, dtype=dtype, device=weight.device)
