"""peft's LoRA layers with the forward pass of ``models.kernels.lora_linear``: same parameters and files, less work.

The class of each layer is swapped for a subclass. It takes the fast path where the layer is plain (one active adapter,
not merged, not disabled, no DoRA or other variant, no LoRA bias) and peft's own forward otherwise; each call decides.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from peftkit.models.kernels import lora_linear
from peftkit.models.patching import with_forward
from peftkit.models.quantization.bitsandbytes_support import dequantizer


def accelerate_lora(model: torch.nn.Module) -> int:
    """Gives every LoRA layer over a linear one the faster forward pass, in place; returns their number."""
    layers = [module for module in model.modules() if type(module) in _peft_classes()]
    for layer in layers:
        cls: Any = type(layer)
        layer.__class__ = _fast_class(cls)
    return len(layers)


@contextlib.contextmanager
def use_peft_forward(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the layers of a model run peft's own forward pass."""
    classes = {module: type(module) for module in model.modules() if type(module).__mro__[1] in _peft_classes()}
    for module, cls in classes.items():
        module.__class__ = cls.__mro__[1]
    try:
        yield
    finally:
        for module, cls in classes.items():
            module.__class__ = cls


@functools.cache
def _peft_classes() -> frozenset[type]:
    """peft's LoRA classes for linear layers, and for 4-bit and 8-bit ones where bitsandbytes is installed."""
    from peft.tuners import lora

    return frozenset(getattr(lora, name) for name in ("Linear", "Linear8bitLt", "Linear4bit") if hasattr(lora, name))


@functools.cache
def _fast_class(cls: Any) -> type[torch.nn.Module]:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = None if args or any(value is not None for value in kwargs.values()) else _plain_adapter(self)
        output: torch.Tensor = cls.forward(self, x, *args, **kwargs) if adapter is None else _forward(self, x, adapter)
        return output

    return with_forward(cls, forward)


def _plain_adapter(layer: Any) -> str | None:
    """The one active adapter of a plain layer, or None; torch.compile always gets peft's own forward."""
    if layer.disable_adapters or layer.merged or torch.compiler.is_compiling():
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = len(active) == 1 and active[0] not in layer.lora_variant and not layer.lora_bias.get(active[0])
    return active[0] if plain else None


def _forward(layer: Any, x: torch.Tensor, adapter: str) -> torch.Tensor:
    """pretrained(x) + scaling · B A dropout(x)"""
    pretrained, device = layer.base_layer, x.device.type
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    dropout = layer.lora_dropout[adapter]
    lora = (a, b, layer.scaling[adapter], float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if type(pretrained) is torch.nn.Linear and pretrained.weight.dtype == dtype and not _must_be_called(pretrained):
        return lora_linear.linear(x.to(dtype), pretrained.weight, pretrained.bias, *lora)
    dequantize = dequantizer(pretrained) if torch.is_grad_enabled() and not _must_be_called(pretrained) else None
    if dequantize is not None:  # without gradients bitsandbytes may have a faster kernel of its own, for single tokens
        return lora_linear.linear(x.to(dtype), dequantize, pretrained.bias, *lora)
    y = pretrained(x)
    if y._is_view():  # bitsandbytes' custom function returns a view, and autograd forbids adding to that in place
        y = y.clone(memory_format=torch.contiguous_format)
    return lora_linear.add(y.contiguous(), x.to(y.dtype), *lora)


def _must_be_called(layer: Any) -> bool:
    """Whether a layer cannot be bypassed: its own parameters are trained, or it has hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(p.requires_grad for p in layer.parameters()) or any(hooks) or hasattr(layer, "_hf_hook")
