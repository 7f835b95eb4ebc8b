"""Dropout in bf16 and fp32 on a CPU, several times cheaper than torch's.

    y = x · m / (1 − p),   m = 1 with probability 1 − p

torch draws a double for every element. Here one 64-bit draw of numpy's SFC64, seeded from torch's generator, serves
four elements, and a few operations on 16-bit integers turn it into mask and factor. p is rounded to a multiple of 2⁻¹⁶
(0.1 becomes 0.10001), and in bf16 1/(1 − p) to bf16, as in torch.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STEPS = 1 << 16  # number of probabilities that 16 bits represent
DTYPES = (torch.bfloat16, torch.float32)


def mask(shape: torch.Size, p: float, dtype: torch.dtype, seed: int | None = None) -> Tensor:
    """1/(1 − p) where an element is kept, 0 where it is dropped, on the CPU; the same ``seed`` gives the same mask."""
    if dtype not in DTYPES:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        keep = torch.empty(shape, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
        return keep.to(dtype).mul_(1 / (1 - p))
    count = shape.numel()
    words = np.random.SFC64(new_seed() if seed is None else seed).random_raw((count + 3) // 4)
    bits = torch.from_numpy(words.view(np.int16)[:count]).view(shape)
    threshold = min(max(round(p * STEPS), 1), STEPS - 1) - STEPS // 2  # the least 16-bit integer that is kept
    bits.clamp_(threshold - 1, threshold).sub_(threshold - 1)  # 0 or 1
    if dtype == torch.float32:
        return bits.to(dtype).mul_(1 / (1 - p))
    return bits.mul_(_bits(1 / (1 - p))).view(torch.bfloat16)


def is_fast(x: Tensor, p: float) -> bool:
    """Whether ``mask`` is used for a tensor: bf16 or fp32 on a CPU, where something but not all is dropped."""
    return 0 < p < 1 and x.dtype in DTYPES and x.device.type == "cpu"


def new_seed() -> int:
    """A seed for ``mask``, drawn from torch's generator."""
    return int(torch.randint(1 << 62, ()).item())


class FastDropout(nn.Dropout):
    """nn.Dropout that uses ``mask`` where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """See ``torch.nn.Dropout``."""
        if self.training and not self.inplace and is_fast(input, self.p) and not torch.compiler.is_compiling():
            return input * mask(input.shape, self.p, input.dtype)
        return super().forward(input)


def use_cpu_dropout(model: Any) -> int:
    """Changes every ``nn.Dropout`` of a model to ``FastDropout``, in place; returns how many."""
    layers = [module for module in model.modules() if type(module) is nn.Dropout]
    for layer in layers:
        layer.__class__ = FastDropout
    return len(layers)


@functools.cache
def _bits(value: float) -> int:
    """A number, rounded to bf16, as a 16-bit integer; without tensors, because planning runs without data."""
    bits = int(np.float32(value).view(np.uint32))
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16  # to the nearest, ties to even
