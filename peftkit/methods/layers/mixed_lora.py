"""LoRA layers that compute rows of several adapters, and of none, in one batch.

    y = W x + B (m ∘ A x)        A = [A₁; A₂; …]    B = [s₁B₁ s₂B₂ …]    m: 1 where a row has that adapter, else 0

The adapters of a layer stand side by side as one of the sum of their ranks, so that a layer takes two matmuls however
many there are; peft's own way, ``adapter_names``, takes two and several copies for each adapter in the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.models.patching import with_forward

ATTRIBUTE = "mixed_adapters"


class RowAdapters:
    """Says under which adapter each row of a batch is; what the layers of one model read."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.numbers: Tensor | None = None
        """[rows] of the adapters, −1 for the base; None while the layers are peft's own."""
        self.all_rows = False
        """Whether there is one adapter only, and every row is under it."""
        self._masks: dict[Any, Tensor] = {}

    @contextmanager
    def rows(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """Within the block, row n of a batch is under ``adapters[n]``, or under none; a single one is every row's."""
        self.numbers = torch.tensor([-1 if name is None else self.names.index(name) for name in adapters])
        self.all_rows = len(self.names) == 1 and all(name is not None for name in adapters)
        self._masks.clear()
        try:
            yield
        finally:
            self.numbers = None

    def mask(self, ranks: tuple[int, ...], low: Tensor) -> Tensor:
        """[rows, …, sum of ranks], 1 where a row has the adapter, for what A gives.

        Raises:
            RuntimeError: what A gives does not have a first dimension of rows.
        """
        assert self.numbers is not None
        if len(self.numbers) not in (1, len(low)) or low.dim() < 2:
            raise RuntimeError(f"{tuple(low.shape)} are not {len(self.numbers)} rows")
        key = (ranks, low.dtype, low.device, low.dim())
        if key not in self._masks:
            owners = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
            mask = self.numbers[:, None] == owners[None]
            shape = (len(mask), *[1] * (low.dim() - 2), mask.shape[1])
            self._masks[key] = mask.to(low.device, low.dtype).view(shape)
        return self._masks[key]


@dataclass(frozen=True)
class _SideBySide:
    """The adapters of one layer."""

    a: Tensor
    """[sum of ranks, in]"""
    b: Tensor
    """[out, sum of ranks], scaled"""
    ranks: tuple[int, ...]
    adapters: RowAdapters
    _cast: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in a dtype, cast once."""
        if dtype not in self._cast:
            self._cast[dtype] = self.a.to(dtype), self.b.to(dtype)
        return self._cast[dtype]


def unmixable_reason(model: Any, names: Sequence[str]) -> str:
    """Why adapters on a model cannot have rows in one batch; empty if they are plain LoRA on linear layers alone."""
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    classes = tuple(getattr(lora, name) for name in ("Linear", "Linear8bitLt", "Linear4bit") if hasattr(lora, name))
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers or not all(isinstance(layer, classes) for layer in layers):
        return "their method is not LoRA on linear layers"
    if any(name in layer.lora_variant or layer.lora_bias.get(name) for layer in layers for name in names):
        return "their method is a variant of LoRA"
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        return "they have trained modules besides LoRA"
    return ""


def mix_lora(model: Any, names: Sequence[str]) -> RowAdapters:
    """Lets batches of a model have rows under several adapters; the ways of peft to choose one go on to work."""
    adapters = RowAdapters(names)
    for layer in _lora_layers(model):
        setattr(layer, ATTRIBUTE, _side_by_side(layer, adapters))
        cls: Any = type(layer)
        layer.__class__ = _mixed_class(cls)
    return adapters


def unmix_lora(model: Any) -> None:
    """Undoes ``mix_lora``."""
    for layer in _lora_layers(model):
        layer.__class__ = type(layer).__mro__[1]
        delattr(layer, ATTRIBUTE)


def _lora_layers(model: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _side_by_side(layer: Any, adapters: RowAdapters) -> _SideBySide:
    own = [name for name in adapters.names if name in layer.lora_A]
    a = torch.cat([layer.lora_A[name].weight.detach() for name in own])
    b = torch.cat([layer.lora_B[name].weight.detach() * layer.scaling[name] for name in own], dim=1)
    ranks = tuple(layer.lora_A[name].weight.shape[0] if name in own else 0 for name in adapters.names)
    return _SideBySide(a, b, ranks, adapters)


@functools.cache
def _mixed_class(cls: Any) -> type[nn.Module]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mixed: _SideBySide = getattr(self, ATTRIBUTE)
        if mixed.adapters.numbers is None:
            return cls.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        y = self.base_layer(x, *args, **kwargs)
        # a CPU multiplies a single token by a narrow matrix faster in fp32, and several faster in half precision
        single = x.device.type == "cpu" and x.numel() == x.shape[-1]
        a, b = mixed.weights(mixed.a.dtype if single else y.dtype)
        with torch.autocast(x.device.type, enabled=False):
            low = F.linear(x.to(a.dtype), a)
            if not mixed.adapters.all_rows:
                low = low * mixed.adapters.mask(mixed.ranks, low)
            return y + F.linear(low, b).to(y.dtype)  # type: ignore[no-any-return]

    return with_forward(cls, forward)
