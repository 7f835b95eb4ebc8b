"""torch.compile for transformer blocks in training (Ansel et al. 2024, ASPLOS, doi:10.1145/3620665.3640366).

All blocks of a class share one compiled function for all lengths; the rest of the model, and evaluation, are not
compiled. peftkit's own kernels step aside during compilation, so that the compiler sees peft's and transformers' code.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from peftkit.errors import RecipeError
from peftkit.models.blocks import find_blocks, unwrap
from peftkit.models.patching import with_forward


def check(device: str, checkpointing: str, *, sharded: bool = False) -> None:
    """Raises RecipeError unless ``training.compile`` works on this device type, with this activation checkpointing."""
    if checkpointing == "selective":
        raise RecipeError(
            "training.compile fuses a block, so that gradient_checkpointing=selective finds no matmuls to save; set "
            "gradient_checkpointing to full or off, or compile=false"
        )
    if sharded:
        raise RecipeError("training.compile does not support parameters sharded over processes; set it to false")
    if reason := _failure(device):
        raise RecipeError(
            f"training.compile: torch's compiler does not work on {device} here ({reason}); install what it needs "
            "(Triton on a GPU, a C++ compiler on a CPU), or set training.compile=false"
        )


def compile_blocks(model: Any) -> None:
    """Compiles the training passes of a model's blocks at their first call.

    Only classes change: names, parameters and checkpoints stay, and copies of the model are compiled too. The
    compiler's caches are reset, because torch recompiles a function a few times at most and then runs it uncompiled.
    """
    torch.compiler.reset()
    for block in find_blocks(unwrap(model))[1]:
        cls: Any = type(block)
        block.__class__ = _compiled(cls)


@functools.cache
def _compiled(cls: Any) -> Any:
    compiled = torch.compile(cls.forward, dynamic=True)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        training = self.training and torch.is_grad_enabled()
        return compiled(self, *args, **kwargs) if training else cls.forward(self, *args, **kwargs)

    return with_forward(cls, forward)


@functools.cache
def _failure(device: str) -> str | None:
    """Why a small function cannot be compiled and differentiated; None where that works."""
    x = torch.linspace(0, 1, 8, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x.sin() * x).sum())(x).backward()
    except Exception as error:  # compilers and drivers raise exceptions of many kinds
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    expected = x.detach().cos() * x.detach() + x.detach().sin()
    return None if x.grad is not None and torch.allclose(x.grad, expected, atol=1e-5) else "gradients are wrong"
