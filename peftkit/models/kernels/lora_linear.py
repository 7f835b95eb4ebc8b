"""A low-rank addition to a linear layer that does no extra work (LoRA, arXiv:2106.09685).

    y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ

All products run in x's precision: no fp32 copy of x, nothing as wide as y beside y itself (the second product is
added in place). x is kept for the backward pass, and x Aᵀ where it is a few columns wide; a wider one is formed once
more. The gradient by x is one product with W to which the low-rank part is added in place, and is left out where x
needs none, so that the backward pass ends at the lowest adapted layer.

Shape suffixes: N tokens, I and O width of input and output, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkit.models.kernels import dropout

Opened = Callable[[torch.dtype], Tensor]
NARROW = 16
"""x Aᵀ is kept for the backward pass where it has at most a sixteenth of x's columns."""
PRODUCTS_ARE_KEPT: ContextVar[bool] = ContextVar("PRODUCTS_ARE_KEPT", default=False)
"""Set while someone else keeps the results of products (selective checkpointing): nothing is then added in place."""


def linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float, p: float
) -> Tensor:
    """A frozen linear layer with its low-rank addition.

    Args:
        x: [..., I] in the weight's dtype.
        weight_OI, bias_O: frozen.
        a_RI, b_OR: trained, in any dtype; cast to x's once a call.
        scale: s.
        p: probability with which an element of x is dropped on its way to A.
    """
    return _Linear.apply(x, weight_OI, bias_O, a_RI, b_OR, scale, p)  # type: ignore[no-any-return]


def dequantized_linear(
    x: Tensor, opened: Opened, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float, p: float
) -> Tensor:
    """``linear`` over a weight that is packed: ``opened`` unpacks it for each product, forward and backward.

    Args:
        opened: gives the frozen weight as [O, I] in a dtype; called once a pass in each direction.
    """
    return _OpenedLinear.apply(x, opened, bias_O, a_RI, b_OR, scale, p)  # type: ignore[no-any-return]


def add(y: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, p: float) -> Tensor:
    """``y`` (the output of any frozen layer, quantized ones too) with the low-rank addition put into it, in place."""
    y = y.clone() if PRODUCTS_ARE_KEPT.get() else y
    return _Add.apply(y, x, a_RI, b_OR, scale, p)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x, weight, bias)
            y = y.clone() if PRODUCTS_ARE_KEPT.get() else y
            keep, small = _add_into(y, x, a, b, scale, p)
        ctx.save_for_backward(x, weight, a, b, keep, small)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, keep, small = ctx.saved_tensors
        grad_x = torch.matmul(grad_y, weight) if ctx.needs_input_grad[0] else None
        grad_x, grad_a, grad_b = _gradients(grad_y, grad_x, x, a, b, keep, small, ctx.scale, ctx.p)
        return grad_x, None, None, grad_a, grad_b, None, None


class _OpenedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, opened: Opened, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x, opened(x.dtype), None if bias is None else bias.to(x.dtype))
            y = y.clone() if PRODUCTS_ARE_KEPT.get() else y
            keep, small = _add_into(y, x, a, b, scale, p)
        ctx.save_for_backward(x, a, b, keep, small)
        ctx.opened, ctx.scale, ctx.p = opened, scale, p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, keep, small = ctx.saved_tensors
        grad_x = torch.matmul(grad_y, ctx.opened(grad_y.dtype)) if ctx.needs_input_grad[0] else None
        grad_x, grad_a, grad_b = _gradients(grad_y, grad_x, x, a, b, keep, small, ctx.scale, ctx.p)
        return grad_x, None, None, grad_a, grad_b, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            keep, small = _add_into(y, x, a, b, scale, p)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, a, b, keep, small)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, keep, small = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        grad_x, grad_a, grad_b = _gradients(grad_y.to(x.dtype), grad_x, x, a, b, keep, small, ctx.scale, ctx.p)
        return grad_y if ctx.needs_input_grad[0] else None, grad_x, grad_a, grad_b, None, None


def _add_into(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float
) -> tuple[Tensor | None, Tensor | None]:
    """Adds the low-rank part to y; returns which elements of x were kept (a byte each, or their mask's seed; None
    without dropout), and x Aᵀ where it is narrow."""
    keep = None
    if 0 < p < 1 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        keep = torch.tensor(dropout.new_seed())  # nothing as large as x is kept
        x = x * dropout.mask(x.shape, p, x.dtype, int(keep))
    elif p > 0:
        x, keep = torch.native_dropout(x, p, True)
    small_NR = F.linear(x, a.to(x.dtype)).flatten(0, -2)
    y_NO = y.view(-1, y.shape[-1])
    y_NO.addmm_(small_NR.to(y.dtype), b.to(y.dtype).T, alpha=scale)
    return keep, small_NR if NARROW * a.shape[0] <= a.shape[1] else None


def _gradients(
    grad_y: Tensor,
    grad_x: Tensor | None,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    keep: Tensor | None,
    small: Tensor | None,
    scale: float,
    p: float,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Adds the low-rank part to ``grad_x`` (None: x needs none), and forms the gradients by A and B."""
    grad_NO = grad_y.reshape(-1, grad_y.shape[-1])
    x_NI = x.reshape(-1, x.shape[-1])
    a_RI, mask_NI = a.to(x.dtype), None
    if keep is not None and keep.dtype != torch.bool:
        mask_NI = dropout.mask(x_NI.shape, p, x.dtype, int(keep))
        x_NI = x_NI * mask_NI
    elif keep is not None:
        mask_NI = keep.reshape(x_NI.shape)
        x_NI = x_NI * mask_NI * (1 / (1 - p))
    small_NR = x_NI @ a_RI.T if small is None else small
    slope_NR = (grad_NO @ b.to(grad_NO.dtype)).mul_(scale)
    grad_a = (slope_NR.T @ x_NI).to(a.dtype)
    grad_b = (grad_NO.T @ small_NR).mul_(scale).to(b.dtype)
    if grad_x is not None and mask_NI is None:
        grad_x.view(x_NI.shape).addmm_(slope_NR, a_RI)
    elif grad_x is not None and mask_NI is not None:
        scaled = 1.0 if mask_NI.is_floating_point() else 1 / (1 - p)
        grad_x.view(x_NI.shape).addcmul_(slope_NR @ a_RI, mask_NI, value=scaled)
    return grad_x, grad_a, grad_b
