"""The transformer blocks of a model, found by looking rather than by architecture names."""

from __future__ import annotations

from torch import nn

from peftkit.errors import ModelError


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and module of the longest list of equal modules: the stack of transformer blocks.

    Raises:
        ModelError: there is none (the parameters are shared across layers, or it is no transformer).
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    ]
    if not found:
        raise ModelError(f"{type(model).__name__} has no list of transformer blocks to choose layers from")
    return max(found, key=lambda item: (len(item[1]), sum(p.numel() for p in item[1].parameters())))
