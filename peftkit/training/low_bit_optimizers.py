"""AdamW whose state takes a quarter of the memory, or lies where it can be paged out, through bitsandbytes.

adamw_8bit keeps both moments in 8 bits, in blocks of 256 with a scale each (Dettmers et al. 2022, arXiv:2110.02861);
tensors of fewer than 4,096 numbers keep them in fp32. The paged ones allocate the state in CUDA's unified memory, from
which the driver moves pages to the CPU's when the GPU's is short (QLoRA, arXiv:2305.14314). On a CPU there is nothing
to page, and they are refused.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch

from peftkit.errors import RecipeError
from peftkit.models.dtypes import silence_libraries

CLASSES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
CONSTANT = ("qmap1", "qmap2")
"""Tables of the 256 values that a byte stands for: the same for every parameter, and not part of the state."""


def check(name: str, device: str, *, sharded: bool = False) -> None:
    """Raises RecipeError unless an optimizer of bitsandbytes works here; other names pass.

    Args:
        name: ``training.optimizer``.
        device: kind of device that trains: cpu, cuda, mps.
        sharded: whether parameters are spread over processes.
    """
    if name not in CLASSES:
        return
    what = f"training.optimizer={name}"
    if find_spec("bitsandbytes") is None:
        raise RecipeError(f"{what} needs bitsandbytes: run `pip install 'peftkit[quantization]'`, or use adamw")
    if name.startswith("paged") and device != "cuda":
        instead = "adamw_8bit" if name.endswith("8bit") else "adamw"
        raise RecipeError(
            f"{what} pages its state out of a CUDA GPU's memory, and this runs on {device}; use {instead}"
        )
    if sharded:
        raise RecipeError(f"{what} cannot hold the state of parameters that are spread over processes; use adamw")
    reason = _failure(name, device)
    if reason:
        raise RecipeError(f"{what} does not work on {device} with this bitsandbytes ({reason}); use adamw")


@functools.cache
def _failure(name: str, device: str) -> str | None:
    """What goes wrong in one step on a tensor that is large enough for 8 bits; None where all goes well."""
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
    from bitsandbytes import optim

    optimizer: torch.optim.Optimizer = getattr(optim, CLASSES[name])(groups, **options)
    return optimizer


def is_low_bit(optimizer: Any) -> bool:
    """Whether an optimizer is one of bitsandbytes'."""
    return hasattr(optimizer, "init_state") and hasattr(optimizer, "fill_qmap")


def restore(optimizer: Any, parameter: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
    """Puts a parameter's state back into buffers that the optimizer allocates itself, paged ones among them."""
    for number, group in enumerate(optimizer.param_groups):
        for place, one in enumerate(group["params"]):
            if one is parameter:
                optimizer.init_state(group, one, number, place)
    held = optimizer.state[parameter]
    for key, tensor in state.items():
        if key == "step":
            held[key] = int(tensor)  # the kernels take a number
        else:
            held[key].copy_(tensor)
