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
    torch.manual_seed(seed_for(seed, step, micro, rank))
