"""RMSNorm in bf16 on a CPU that saves its input and one number per token (Zhang & Sennrich 2019, arXiv:1910.07467).

    y = w · x / √(mean(x²) + ε)

transformers' layer consists of eight operations, for which autograd saves two copies of x in fp32 and two in bf16. The
same operations here give the same bits, and the backward pass converts x to fp32 once more. Shape suffix: H width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkit.models.patching import with_forward


def use_cpu_rms_norm(model: Any) -> int:
    """Changes every RMSNorm with the same code as Llama's to use ``rms_norm`` on a CPU, in place; returns how many."""
    changed = 0
    for module in model.modules():
        cls: Any = type(module)
        if cls.__name__.endswith("RMSNorm") and _is_llamas(cls):
            module.__class__ = _with_rms_norm(cls)
            changed += 1
    return changed


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of x, [..., H] in bf16 or fp16, with a weight of any dtype; statistics are in fp32."""
    return _RMSNorm.apply(x, weight_H, epsilon)  # type: ignore[no-any-return]


@functools.cache
def _is_llamas(cls: Any) -> bool:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    code, llama = cls.forward.__code__, LlamaRMSNorm.forward.__code__
    return all(getattr(code, name) == getattr(llama, name) for name in ("co_code", "co_names", "co_consts"))


@functools.cache
def _with_rms_norm(cls: Any) -> type[torch.nn.Module]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        half = hidden_states.dtype in (torch.bfloat16, torch.float16)
        if not half or hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
            return cls.forward(self, hidden_states)  # type: ignore[no-any-return]
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return with_forward(cls, forward)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32)
        factor = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return weight * wide.mul_(factor).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        wide, grad_x, grad_weight = x.to(torch.float32), None, None
        if ctx.needs_input_grad[1]:
            normal = (wide * factor).to(x.dtype)
            grad_weight = (grad * normal).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad_normal = (grad * weight).to(torch.float32)
            # d factor / dx = −factor³ x / H
            shared = (grad_normal * wide).sum(-1, keepdim=True).mul_(factor.pow(3)).div_(-x.shape[-1])
            grad_x = grad_normal.mul_(factor).addcmul_(wide, shared).to(x.dtype)
        return grad_x, grad_weight, None
