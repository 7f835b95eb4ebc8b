"""Random numbers that are a function of where training stands.

Before every micro-batch torch is seeded from (seed, step, micro-batch, process): dropout then needs no stored state,
and a resumed run draws what the uninterrupted run drew.
"""

from __future__ import annotations

import numpy as np
import torch


def seed_for(*place: int) -> int:
    """A well-mixed 63-bit seed for a tuple of non-negative integers."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)


def seed_micro_batch(seed: int, step: int, micro: int, rank: int) -> None:
    """Seeds torch on every device for one forward and backward pass."""
    value = seed_for(seed, step, micro, rank)
    torch.default_generator.manual_seed(value)
    # torch.manual_seed would note a call, with its traceback, for every kind of device that is not there
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
    if torch.xpu.is_available():
        torch.xpu.manual_seed_all(value)
