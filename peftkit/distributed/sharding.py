"""Parameters that are spread over the processes: made whole to be saved, and cut again when they are loaded.

FSDP2 keeps every parameter as a DTensor, of which a process holds its share; DeepSpeed has ways of its own (``zero``).
Gathering one is a collective: all processes must call ``whole`` on the same tensors in the same order, whichever of
them then writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peftkit.distributed import zero
from peftkit.errors import RecipeError
from peftkit.schema.recipe import Recipe


def check(accelerator: Any, recipe: Recipe) -> None:
    """Raises RecipeError for ways of sharding that the loop cannot train with, before any work is done."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    ways = "use configs/accelerate/fsdp2.yaml, which shards the same things, or plain data parallelism"
    if kind == "DEEPSPEED":
        zero.check(accelerator, recipe)
    if kind == "FSDP" and not getattr(accelerator, "is_fsdp2", False):
        raise RecipeError(f"accelerate is configured for FSDP 1; set fsdp_version: 2 (or {ways})")
    if kind in {"MEGATRON_LM", "TP"}:
        raise RecipeError(f"accelerate is configured for {kind}, which is not supported; {ways}")


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether some parameters lie in pieces on several processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def settle(module: torch.nn.Module) -> None:
    """Gives every parameter back its piece: after an evaluation the outermost ones are still gathered.

    What is written into a gathered parameter would be lost, and the optimizer knows the pieces only.
    """
    for part in module.modules():
        reshard = getattr(part, "reshard", None)
        if reshard is not None:
            reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or of one in pieces all of it; a collective in that case."""
    if zero.holds(tensor):
        return zero.whole(tensor)
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def like(tensor: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """A whole tensor, cut and placed as ``held`` is where the two have one shape; no communication.

    Every process gives the same tensor and keeps its own piece of it.
    """
    mesh = getattr(held, "device_mesh", None)
    if mesh is None or tensor.shape != held.shape:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    placed = DTensor.from_local(tensor.to(held.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return placed.redistribute(mesh, held.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def load(parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts whole tensors into parameters of the same names."""
    for name, parameter in parameters.items():
        if zero.holds(parameter):
            zero.put(parameter, tensors[name])
            continue
        parameter.copy_(like(tensors[name].to(parameter.dtype), parameter))
