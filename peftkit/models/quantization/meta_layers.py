"""Quantized linear layers without weights: the bytes, products and saved tensors of bitsandbytes' layers, for planning.

    NF4   ½ byte a weight; a 4-byte scale for each block of 64, or (double) a 1-byte scale and 4 bytes for 256 of them
    INT8  1 byte a weight, a 4-byte scale for each row

A product opens the weight to the compute dtype and lets go of it again, forward and backward. What is kept for the
backward pass differs: INT8 keeps its input, the 4-bit product keeps nothing (since bitsandbytes 0.43.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK, OUTER_BLOCK = 64, 256
TABLES = 16 * 4 + 256 * 4 + 4
"""Bytes of the lookup tables and the offset that double quantization keeps beside each weight."""
SCALES = "scales"


@dataclass(frozen=True)
class Held:
    """How a quantization holds a matrix."""

    kind: str
    double: bool = False
    block: int = BLOCK
    """Weights to a scale, in 4 bits."""
    outer: int = OUTER_BLOCK
    """Scales to a scale of theirs."""

    def weight_bytes(self, weights: int) -> int:
        """Bytes of the packed weights."""
        return (weights + 1) // 2 if self.kind == "nf4" else weights

    def constant_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the scales and tables of a matrix of [rows, columns]."""
        if self.kind == "int8":
            return 4 * rows
        blocks = -(-rows * columns // self.block)
        if not self.double:
            return 4 * blocks + 16 * 4
        return blocks + 4 * -(-blocks // self.outer) + TABLES


def replace_linear(model: nn.Module, held: Held, dtype: torch.dtype, skipped: Sequence[str]) -> None:
    """Puts stand-ins in the place of the linear layers that transformers would quantize.

    Args:
        skipped: names of modules that are never quantized.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = list(skipped) or None
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D)) and should_convert_module(name, patterns):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _stand_in(module, held, dtype))
    flag = "is_loaded_in_4bit" if held.kind == "nf4" else "is_loaded_in_8bit"
    setattr(model, flag, True)  # methods ask for it, as they do of a model that bitsandbytes holds


def _stand_in(linear: Any, held: Held, dtype: torch.dtype) -> nn.Module:
    import torch
    from torch import nn

    rows, columns = linear.weight.shape if isinstance(linear, nn.Linear) else linear.weight.T.shape
    with torch.no_grad():
        layer = _layer_class(held.kind).__new__(_layer_class(held.kind))
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = columns, rows
        size = (held.weight_bytes(rows * columns), 1) if held.kind == "nf4" else (rows, columns)
        weight: Any = nn.Parameter(
            torch.empty(size, dtype=torch.uint8 if held.kind == "nf4" else torch.int8), requires_grad=False
        )
        weight.quant_type, weight.compress_statistics = held.kind, held.double
        if held.kind == "nf4":
            shape = torch.Size((rows, columns))
            weight.quant_state = SimpleNamespace(shape=shape, quant_type="nf4", dtype=dtype)
        layer.weight = weight
        layer.register_buffer(SCALES, torch.empty(held.constant_bytes(rows, columns), dtype=torch.uint8))
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        layer.bias = bias
        layer.held, layer.compute_dtype, layer.quant_state = held, dtype, getattr(weight, "quant_state", None)
        layer.state = SimpleNamespace(has_fp16_weights=False, threshold=6.0)
        layer.index = None
    return layer


def _layer_class(kind: str) -> Any:
    """A subclass of bitsandbytes' layer where that is installed, so that methods treat it as one."""
    import importlib.util

    from torch import nn

    base: Any = nn.Linear
    if importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes as bnb

        base = bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt
    opened = {"open_weight": property(_open_weight)} if kind == "nf4" else {}
    return type("Skeleton" + base.__name__, (base,), {"forward": _forward, **opened})


def _open_weight(self: Any) -> Any:
    """As ``peftkit.models.quantization.dequantize`` opens a real one."""
    return partial(_opened, self.weight, self.in_features)


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    import torch

    given, kind = x.dtype, "cpu" if x.is_meta else x.device.type  # the meta device has no autocast
    if self.held.kind == "nf4":
        x = x.to(self.compute_dtype)
    elif torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        out = _product()(x, self.weight, self.in_features, self.held)
        if self.bias is not None:
            out = out.add_(self.bias.to(out.dtype))
    return out.to(given) if self.held.kind == "nf4" else out


def _product() -> Any:
    import torch

    class Opened(torch.autograd.Function):
        """x Wᵀ with W opened for the product alone."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, columns: int, held: Held) -> torch.Tensor:
            ctx.save_for_backward(weight)
            ctx.columns, ctx.dtype = columns, x.dtype
            ctx.kept = x if held.kind == "int8" else None
            return torch.nn.functional.linear(x, _opened(weight, columns, x.dtype))

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
            (weight,) = ctx.saved_tensors
            return torch.matmul(grad, _opened(weight, ctx.columns, grad.dtype)), None, None, None

    return Opened.apply


def _opened(weight: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    numbers = weight.numel() * (2 if weight.dtype == torch.uint8 else 1)
    return torch.empty(numbers // columns, columns, dtype=dtype, device=weight.device)
