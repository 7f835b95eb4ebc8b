"""A linear layer with a low-rank update, without extra work (LoRA, Hu et al. 2021, arXiv:2106.09685).

    y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ

All matmuls run in x's dtype, without an fp32 copy of x, and the second low-rank matmul is accumulated into y in place.
x is saved for the backward pass, and x Aᵀ if it is narrow. The gradient by x is one matmul with W, to which the
low-rank part is added in place; it is skipped where x needs none.

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

Weight = Tensor | Callable[[torch.dtype], Tensor]
NARROW = 16  # x Aᵀ is saved for the backward pass if x has at least this many times as many columns
MATMULS_ARE_SAVED: ContextVar[bool] = ContextVar("MATMULS_ARE_SAVED", default=False)
"""Set while selective checkpointing saves the results of matmuls, which must then not be changed in place."""


def linear(
    x: Tensor, weight_OI: Weight, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float, p: float
) -> Tensor:
    """A frozen linear layer with its low-rank update, [..., O].

    Args:
        x: [..., I] in the weight's dtype.
        weight_OI: frozen; or a function that dequantizes it to a dtype, called once per pass in each direction.
        a_RI, b_OR: trained, in any dtype; cast to x's once per call.
        p: probability of dropping an element of x before A.
    """
    return _Linear.apply(x, weight_OI, bias_O, a_RI, b_OR, scale, p)  # type: ignore[no-any-return]


def add(y: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, p: float) -> Tensor:
    """Adds the low-rank update to ``y``, the output of any frozen layer, in place."""
    y = y.clone() if MATMULS_ARE_SAVED.get() else y
    return _Add.apply(y, x, a_RI, b_OR, scale, p)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = _matmul(x, _matrix(weight, x.dtype), None if bias is None else bias.to(x.dtype))
            y = y.clone() if MATMULS_ARE_SAVED.get() else y
            keep, small = _add_into(y, x, a, b, scale, p)
        is_matrix = isinstance(weight, Tensor)
        ctx.save_for_backward(x, weight if is_matrix else None, a, b, keep, small)
        ctx.dequantize, ctx.scale, ctx.p = None if is_matrix else weight, scale, p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, keep, small = ctx.saved_tensors
        weight = ctx.dequantize if weight is None else weight
        grad_x = torch.matmul(grad_y, _matrix(weight, grad_y.dtype)) if ctx.needs_input_grad[0] else None
        grad_x, grad_a, grad_b = _gradients(ctx, grad_y, grad_x, x, a, b, keep, small)
        return grad_x, None, None, grad_a, grad_b, None, None


def _matmul(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x Wᵀ + b, never a view: models may change a layer's output in place, which autograd forbids for views."""
    y = F.linear(x, weight_OI, bias_O)
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y  # type: ignore[no-any-return]


def _matrix(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight(dtype)


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
        grad_x, grad_a, grad_b = _gradients(ctx, grad_y.to(x.dtype), grad_x, x, a, b, keep, small)
        return grad_y if ctx.needs_input_grad[0] else None, grad_x, grad_a, grad_b, None, None


def _add_into(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float
) -> tuple[Tensor | None, Tensor | None]:
    """Adds the low-rank update to y in place.

    Returns which elements dropout kept (a byte each, or the mask's seed; None without dropout), and x Aᵀ if narrow.
    """
    keep = None
    if dropout.is_fast(x, p):
        keep = torch.tensor(dropout.new_seed())  # nothing as large as x is saved
        x = x * dropout.mask(x.shape, p, x.dtype, int(keep))
    elif p > 0:
        x, keep = torch.native_dropout(x, p, True)
    small_NR = F.linear(x, a.to(x.dtype)).flatten(0, -2)
    y_NO = y.view(-1, y.shape[-1])
    y_NO.addmm_(small_NR.to(y.dtype), b.to(y.dtype).T, alpha=scale)
    return keep, small_NR if NARROW * a.shape[0] <= a.shape[1] else None


def _gradients(
    ctx: Any, grad_y: Tensor, grad_x: Tensor | None, x: Tensor, a: Tensor, b: Tensor, keep: Any, small: Any
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Adds the low-rank part to ``grad_x`` (None if x needs no gradient), and computes the gradients by A and B."""
    scale, p = ctx.scale, ctx.p
    grad_NO = grad_y.reshape(-1, grad_y.shape[-1])
    x_NI = x.reshape(-1, x.shape[-1])
    a_RI, factor = a.to(x.dtype), 1.0
    mask_NI: Any = None
    if keep is not None and keep.dtype == torch.bool:
        mask_NI, factor = keep.reshape(x_NI.shape), 1 / (1 - p)
        x_NI = x_NI * mask_NI * factor
    elif keep is not None:
        mask_NI = dropout.mask(x_NI.shape, p, x.dtype, int(keep))
        x_NI = x_NI * mask_NI
    small_NR = x_NI @ a_RI.T if small is None else small
    grad_NR = (grad_NO @ b.to(grad_NO.dtype)).mul_(scale)
    grad_a = (grad_NR.T @ x_NI).to(a.dtype)
    grad_b = (grad_NO.T @ small_NR).mul_(scale).to(b.dtype)
    if grad_x is not None and mask_NI is None:
        grad_x.view(x_NI.shape).addmm_(grad_NR, a_RI)
    elif grad_x is not None:
        grad_x.view(x_NI.shape).addcmul_(grad_NR @ a_RI, mask_NI, value=factor)
    return grad_x, grad_a, grad_b
