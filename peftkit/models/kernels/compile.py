"""Transformer blocks compiled by torch (Ansel et al. 2024, ASPLOS, doi:10.1145/3620665.3640366) for training passes.

All blocks of a kind share one function, compiled once for all lengths; what is around them, and evaluation, stay as
they are. The kernels written here for one operation or other step aside while the compiler looks, which forms its own
out of peft's and transformers' plain code.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from peftkit.errors import RecipeError
from peftkit.models.blocks import find_blocks
from peftkit.models.packing import underlying


def check(device: str, checkpointing: str, *, sharded: bool = False) -> None:
    """Raises RecipeError unless ``training.compile`` works here.

    Args:
        device: kind of device that trains: cpu, cuda, mps.
        checkpointing: ``training.gradient_checkpointing``.
        sharded: whether parameters are spread over processes.
    """
    if checkpointing == "selective":
        raise RecipeError(
            "training.compile makes one piece of a block, in which gradient_checkpointing=selective finds no products "
            "to keep; set gradient_checkpointing to full or off, or compile=false"
        )
    if sharded:
        raise RecipeError("training.compile is not made for parameters that are spread over processes; set it to false")
    reason = _failure(device)
    if reason:
        raise RecipeError(
            f"training.compile: torch's compiler does not work on {device} here ({reason}); it needs Triton on a GPU, "
            "or a C++ compiler on a CPU; install that, or set training.compile=false"
        )


def compile_blocks(model: Any) -> int:
    """Compiles the training passes of a model's blocks, at their first call; returns how many blocks there are.

    Classes alone change: names, parameters and what is saved stay, and copies of the model are compiled too. What this
    process compiled before is forgotten, for torch compiles one function a few times at most, and leaves it plain then.
    """
    torch.compiler.reset()
    blocks = find_blocks(underlying(model))[1]
    for block in blocks:
        cls: Any = type(block)
        block.__class__ = _compiled(cls)
    return len(blocks)


def without() -> contextlib.AbstractContextManager[Any]:
    """A context in which compiled blocks run uncompiled."""
    return torch.compiler.set_stance("force_eager")


@functools.cache
def _compiled(cls: Any) -> Any:
    compiled = torch.compile(cls.forward, dynamic=True)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        training = self.training and torch.is_grad_enabled()
        return compiled(self, *args, **kwargs) if training else cls.forward(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__})


@functools.cache
def _failure(device: str) -> str | None:
    """What goes wrong when a small function is compiled and differentiated; None where all goes well."""
    given = torch.linspace(0, 1, 8, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x.sin() * x).sum())(given).backward()
    except Exception as error:  # compilers and drivers fail in ways of their own
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    wanted = given.detach().cos() * given.detach() + given.detach().sin()
    return None if given.grad is not None and torch.allclose(given.grad, wanted, atol=1e-5) else "gradients are wrong"
