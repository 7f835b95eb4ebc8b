"""Random numbers as a function of the position in training.

Torch is seeded from (seed, step, micro-batch, rank) before every micro-batch: dropout needs no stored state, and a
resumed run draws the numbers that an uninterrupted one draws.
"""

from __future__ import annotations

import numpy as np
import torch


def seed_micro_batch(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Seed torch on every device for one micro-batch."""
    sequence = np.random.SeedSequence((seed, step, micro_batch, rank))
    value = int(sequence.generate_state(1, np.uint64)[0] >> 1)
    torch.default_generator.manual_seed(value)
    # torch.manual_seed would record a call, with its traceback, for every kind of device that is absent
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
    if torch.xpu.is_available():
        torch.xpu.manual_seed_all(value)
