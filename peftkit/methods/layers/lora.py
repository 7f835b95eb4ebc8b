"""peft's LoRA layers with the forward pass of ``models.kernels.lora_linear``: same parameters and files, less work.

A layer's class is swapped for a subclass that takes the short way when the layer is plain (one active adapter, not
merged, not disabled, no DoRA or other variant, no bias of its own) and peft's own way otherwise, decided at each call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def accelerate_lora(model: torch.nn.Module) -> int:
    """Gives every LoRA layer over a matrix the faster forward pass, in place; returns how many there are.

    Nothing but the class changes: parameters, names, ``state_dict`` and what peft saves stay as they are.
    """
    changed = 0
    for module in model.modules():
        cls: Any = type(module)
        if cls in _layer_classes():
            module.__class__ = _faster(cls)
            changed += 1
    return changed


@contextlib.contextmanager
def plainly(model: torch.nn.Module) -> Iterator[None]:
    """Lets the layers of a model take peft's own way for a while."""
    ours = {module: type(module) for module in model.modules() if type(module).__mro__[1] in _layer_classes()}
    for module, kind in ours.items():
        module.__class__ = kind.__mro__[1]
    try:
        yield
    finally:
        for module, kind in ours.items():
            module.__class__ = kind


@functools.cache
def _layer_classes() -> frozenset[type]:
    """peft's LoRA layers over a matrix; those over 4-bit and 8-bit ones where bitsandbytes is installed."""
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from peft.tuners.lora.layer import Linear

    found: set[type] = {Linear}
    if is_bnb_available():
        from peft.tuners.lora.bnb import Linear8bitLt

        found.add(Linear8bitLt)
    if is_bnb_4bit_available():
        from peft.tuners.lora.bnb import Linear4bit

        found.add(Linear4bit)
    return frozenset(found)


@functools.cache
def _faster(cls: type) -> type:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = None if args or any(value is not None for value in kwargs.values()) else _plain_adapter(self)
        if adapter is None:
            return cls.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined, no-any-return]
        return _forward(self, x, adapter)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": __name__, "__doc__": cls.__doc__})


def _plain_adapter(layer: Any) -> str | None:
    """The one active adapter of a layer that is plain, or None; the compiler gets to see peft's own way."""
    import torch

    if layer.disable_adapters or layer.merged or torch.compiler.is_compiling():
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_bias.get(active[0]):
        return None
    return active[0]


def _forward(layer: Any, x: torch.Tensor, adapter: str) -> torch.Tensor:
    import torch

    from peftkit.models.kernels import lora_linear
    from peftkit.models.quantization.dequantize import dequantizer

    base, device = layer.base_layer, x.device.type
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    dropout = layer.lora_dropout[adapter]
    low = (a, b, layer.scaling[adapter], float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if type(base) is torch.nn.Linear and base.weight.dtype == dtype and not _is_watched(base):
        return lora_linear.linear(x.to(dtype), base.weight, base.bias, *low)
    opened = dequantizer(base) if torch.is_grad_enabled() and not _is_watched(base) else None
    if opened is not None:  # without gradients bitsandbytes may have a faster kernel of its own, for a token at a time
        return lora_linear.dequantized_linear(x.to(dtype), opened, base.bias, *low)
    out = base(x)
    if out._is_view():  # autograd lets nobody add in place to a view that a custom function made, as bitsandbytes' does
        out = out.clone(memory_format=torch.contiguous_format)
    out = out.contiguous()
    return lora_linear.add(out, x.to(out.dtype), *low)


def _is_watched(base: Any) -> bool:
    """Whether the layer must be called as it is: it is trained itself, or hooks stand around its call."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return any(p.requires_grad for p in base.parameters()) or any(hooks) or hasattr(base, "_hf_hook")
