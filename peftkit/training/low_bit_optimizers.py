"""bitsandbytes' AdamW, with a state of a quarter of the size, or in memory that can be paged out.

adamw_8bit keeps both moments in 8 bits, in blocks of 256 with a scale each (Dettmers et al. 2022, arXiv:2110.02861);
tensors of fewer than 4,096 numbers keep fp32 moments. The paged optimizers allocate the state in CUDA's unified memory,
from which the driver moves pages to the CPU when the GPU's memory is short (QLoRA, arXiv:2305.14314).
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from peftkit.errors import RecipeError
from peftkit.models.quantization import bitsandbytes_support
from peftkit.models.third_party import silence_libraries

CLASSES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
CONSTANT = ("qmap1", "qmap2")
"""Tables of the 256 values of a byte: equal for all parameters, and not part of the state."""


def check(name: str, device: str, *, sharded: bool = False) -> None:
    """Raise RecipeError if an optimizer of bitsandbytes does not work on a kind of device; other names pass."""
    if name not in CLASSES:
        return
    field = f"training.optimizer={name}"
    if not bitsandbytes_support.is_installed():
        raise RecipeError(f"{field} needs bitsandbytes: run `pip install 'peftkit[quantization]'`, or use adamw")
    if name.startswith("paged") and device != "cuda":
        alternative = "adamw_8bit" if name.endswith("8bit") else "adamw"
        raise RecipeError(
            f"{field} pages its state out of a CUDA GPU's memory, but this run is on {device}; use {alternative}"
        )
    if sharded:
        raise RecipeError(f"{field} does not support sharded parameters; use adamw")
    if reason := _failure(name, device):
        raise RecipeError(f"{field} does not work on {device} with this bitsandbytes ({reason}); use adamw")


@functools.cache
def _failure(name: str, device: str) -> str | None:
    """The error of one step on a tensor that is large enough for 8 bits; None if the step works."""
    weight = torch.nn.Parameter(torch.ones(64, 64, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        build(name, [{"params": [weight]}], lr=0.1).step()
    except (RuntimeError, NotImplementedError, AttributeError, ImportError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None if bool((weight < 1).all()) else "a step changes nothing"


def build(name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """The optimizer of that name over parameter groups; ``options`` are lr, betas and eps."""
    silence_libraries()
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes_support.optimizers(), CLASSES[name])(groups, **options)
    return optimizer


def restore(optimizer: Any, parameter: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
    """Restore a parameter's state into buffers that the optimizer allocates itself, since they may be paged."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, candidate in enumerate(group["params"]):
            if candidate is parameter:
                optimizer.init_state(group, candidate, group_index, index)
    buffers = optimizer.state[parameter]
    for key, tensor in state.items():
        if key == "step":
            buffers[key] = int(tensor)  # the kernels take a number
        else:
            buffers[key].copy_(tensor)
