"""A model's structure, independent of its architecture: the model inside its wrappers, and its blocks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from peftkit.errors import ModelError


def unwrap(model: Any) -> Any:
    """The transformers model inside the wrappers of peft, torch.compile and distribution (DDP, FSDP, DeepSpeed)."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def text_encoder(backbone: Any) -> Any:
    """What reads a text: of an encoder–decoder the encoder, since the decoder needs a text of its own."""
    return backbone.get_encoder() if getattr(backbone.config, "is_encoder_decoder", False) else backbone


def forward_parameters(model: Any) -> frozenset[str]:
    """Names of the arguments that the unwrapped model's ``forward`` takes."""
    return _parameters(type(unwrap(model)).forward)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and module of the longest list of modules of one class, the transformer blocks; ModelError without any."""
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    ]
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no list of transformer blocks to choose layers from")
    return max(stacks, key=lambda stack: (len(stack[1]), sum(p.numel() for p in stack[1].parameters())))
