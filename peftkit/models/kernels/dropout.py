"""Dropout in bf16 on a CPU, several times cheaper than torch's.

    y = x · m / (1 − p),   m = 1 with probability 1 − p

torch draws a double for every element. Here one 64-bit draw of numpy's SFC64, seeded from torch's generator, serves
four elements, and a few operations on 16-bit integers turn it into mask and factor. p is rounded to a multiple of 2⁻¹⁶
(0.1 becomes 0.10001), and 1/(1 − p) to bf16, as in torch.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STEPS = 1 << 16  # number of probabilities that 16 bits represent


def mask(shape: torch.Size, p: float, dtype: torch.dtype, seed: int | None = None) -> Tensor:
    """1/(1 − p) where an element is kept, 0 where it is dropped, on the CPU; the same ``seed`` gives the same mask."""
    if dtype != torch.bfloat16:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        keep = torch.empty(shape, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
        return keep.to(dtype).mul_(1 / (1 - p))
    count = shape.numel()
    words = np.random.SFC64(new_seed() if seed is None else seed).random_raw((count + 3) // 4)
    bits = torch.from_numpy(words.view(np.int16)[:count]).view(shape)
    threshold = min(max(round(p * STEPS), 1), STEPS - 1) - STEPS // 2  # the least 16-bit integer that is kept
    bits.clamp_(threshold - 1, threshold).sub_(threshold - 1)  # 0 or 1
    return bits.mul_(_bits(1 / (1 - p))).view(torch.bfloat16)


def new_seed() -> int:
    """A seed for ``mask``, drawn from torch's generator."""
    return int(torch.randint(1 << 62, ()).item())


class FastDropout(nn.Dropout):
    """nn.Dropout that uses ``mask`` for bf16 tensors on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """See ``torch.nn.Dropout``."""
        fast = self.training and input.dtype == torch.bfloat16 and input.device.type == "cpu" and not self.inplace
        if not fast or not 0 < self.p < 1 or torch.compiler.is_compiling():
            return super().forward(input)
        return input * mask(input.shape, self.p, input.dtype)


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
