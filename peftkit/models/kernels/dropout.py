"""Dropout in bf16 on a CPU at the price of a product, in place of eight times that.

    y = x · m / (1 − p),   m = 1 with probability 1 − p

torch draws a double for every element. Here one 64-bit draw serves four elements, each kept or not by 16 bits of its
own, and mask and factor become one bf16 tensor by a few operations on 16-bit integers. The bits come from numpy's SFC64
under a seed from torch's generator, which alone is slower by half. p is rounded to a multiple of
2⁻¹⁶, so that 0.1 is 0.10001; 1/(1 − p) is rounded to bf16, as in torch.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STEPS = 1 << 16
"""Probabilities that 16 bits can tell apart."""


def mask(shape: torch.Size, p: float, dtype: torch.dtype, seed: int | None = None) -> Tensor:
    """1/(1 − p) where an element is kept, 0 where it is dropped, on the CPU.

    Args:
        seed: of a generator of its own, so that the same mask can be made again; None draws from torch's.
    """
    if dtype != torch.bfloat16:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        kept = torch.empty(shape, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
        return kept.to(dtype).mul_(1 / (1 - p))
    count = shape.numel()
    words = np.random.SFC64(new_seed() if seed is None else seed).random_raw((count + 3) // 4)
    bits = torch.from_numpy(words.view(np.int16)[:count]).view(shape)
    first_kept = _first_kept(p)
    bits.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1)  # 0 or 1
    return bits.mul_(_bits(1 / (1 - p))).view(torch.bfloat16)


def new_seed() -> int:
    """A seed for ``mask``, drawn from torch's generator."""
    return int(torch.randint(1 << 62, ()).item())


class FastDropout(nn.Dropout):
    """nn.Dropout, of bf16 tensors on a CPU by ``mask``."""

    def forward(self, input: Tensor) -> Tensor:
        """See ``torch.nn.Dropout``."""
        ours = self.training and input.dtype == torch.bfloat16 and input.device.type == "cpu" and not self.inplace
        if not ours or not 0 < self.p < 1 or torch.compiler.is_compiling():
            return super().forward(input)
        return input * mask(input.shape, self.p, input.dtype)


def cpu_dropout(model: Any) -> int:
    """Gives every dropout layer of a model on the CPU the faster forward pass, in place; returns how many there are."""
    layers = [module for module in model.modules() if type(module) is nn.Dropout]
    for layer in layers:
        layer.__class__ = FastDropout
    return len(layers)


def _first_kept(p: float) -> int:
    """The least of the 16-bit integers that stand for an element that is kept."""
    return min(max(round(p * STEPS), 1), STEPS - 1) - STEPS // 2


@functools.cache
def _bits(value: float) -> int:
    """A number, rounded to bf16, as a 16-bit integer; worked out without tensors, which have no values in plans."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return int(bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to the nearest, ties to even
