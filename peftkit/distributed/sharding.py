"""Sharded parameters: gathered in full to be saved, and sharded again when they are loaded.

FSDP2 keeps every parameter as a DTensor, of which a process holds its shard; DeepSpeed has its own ways (``zero``).
Unsharding is a collective: all processes must call ``unshard`` on the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peftkit.distributed import zero
from peftkit.errors import RecipeError
from peftkit.schema.recipe import Recipe

DEEPSPEED = "DEEPSPEED"


def strategy(accelerator: Any) -> str:
    """Accelerate's distributed type by name: ``NO``, ``MULTI_GPU``, ``FSDP``, ``DEEPSPEED``, …"""
    return str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))


def check(accelerator: Any, recipe: Recipe) -> None:
    """Raises RecipeError for a sharding strategy that the training loop does not support."""
    name = strategy(accelerator)
    if name == DEEPSPEED:
        zero.check(accelerator, recipe)
    if name == "FSDP" and not getattr(accelerator, "is_fsdp2", False):
        raise RecipeError(f"accelerate is configured for FSDP 1; set fsdp_version: 2 (or {zero.ALTERNATIVES})")
    if name in {"MEGATRON_LM", "TP"}:
        raise RecipeError(f"accelerate is configured for {name}, which is not supported; {zero.ALTERNATIVES}")


def reshard(module: torch.nn.Module) -> None:
    """Reshards every parameter: what is written into one that an evaluation left gathered would be lost."""
    for submodule in module.modules():
        method: Any = getattr(submodule, "reshard", None)
        if method is not None:
            method()


def unshard(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor: a collective if it is sharded, otherwise the tensor itself."""
    if zero.is_partitioned(tensor):
        return zero.unshard(tensor)
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def shard_like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A full tensor, equal on every process, sharded and placed like a target of the same shape; no communication."""
    mesh = getattr(target, "device_mesh", None)
    if mesh is None or tensor.shape != target.shape:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    replicated = DTensor.from_local(tensor.to(target.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, target.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def load_full(parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies full tensors into the parameters of the same names, sharded or not."""
    for name, parameter in parameters.items():
        if zero.is_partitioned(parameter):
            zero.load_parameter(parameter, tensors[name])
        else:
            parameter.copy_(shard_like(tensors[name].to(parameter.dtype), parameter))
