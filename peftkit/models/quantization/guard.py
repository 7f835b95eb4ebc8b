"""Keeps a 4-bit model's gradients right after it was evaluated.

On processors with AVX512-BF16, bitsandbytes repacks the weights of a ``Linear4bit`` for a faster kernel the first time
it runs in evaluation mode without gradients. That kernel has no backward pass for the packed layout, and training that
goes on afterwards gets wrong gradients, silently. The layer decides by its attribute ``support_avx512bf16_for_cpu``.
"""

from __future__ import annotations

from torch import nn

SWITCH = "support_avx512bf16_for_cpu"


def keep_gradients(model: nn.Module) -> int:
    """Forbids the repacking in every 4-bit layer; returns in how many."""
    changed = 0
    for module in model.modules():
        if getattr(module, SWITCH, False):
            setattr(module, SWITCH, False)
            changed += 1
    return changed
