"""What ``model.offload`` moves, and how long that takes: two blocks are on the device, the others elsewhere.

A micro-batch reads every block in its forward pass, and in its backward pass those above the lowest trained weight,
except the last two, which are still there. Copies run next to computations, so that a step takes as long as the slower
of both.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from peftkit.models.meta_layers import SCALES
from peftkit.models.offload import AT_ONCE, block_tensors, check_blocks, find_all_blocks
from peftkit.models.offload_store import buffer_bytes
from peftkit.schema.recipe import OffloadConfig
from peftkit.schema.types import LoadedModel, in_head

RATES = {"cpu": 12e9, "disk": 2e9}
"""Assumed bytes per second: of pinned memory over PCIe 3.0 with 16 lanes, and of sequential reads from an NVMe disk."""


@dataclass(frozen=True)
class OffloadedBlocks:
    """The offloaded part of a model, in bytes."""

    to: str
    weights: int
    """Frozen weights and buffers."""
    constants: int
    """Quantization constants."""
    on_device: int
    """The most that two neighboring blocks take on the device."""
    forward: int
    """What the forward pass of a micro-batch reads."""
    backward: int
    """What its backward pass reads."""

    def seconds(self, micro_batches: float, evaluations: float) -> tuple[float, float]:
        """Time to read the blocks for micro-batches of training and of evaluation."""
        rate = RATES[self.to]
        return micro_batches * (self.forward + self.backward) / rate, evaluations * self.forward / rate


def offloaded_blocks(loaded: LoadedModel, config: OffloadConfig) -> OffloadedBlocks:
    """What is offloaded of a model, with or without data, as ``models.offload`` does it."""
    modules = find_all_blocks(loaded.model)
    tensors = block_tensors(loaded.model, modules)
    check_blocks(loaded.model, tensors)
    sizes = [buffer_bytes(each) for each in tensors]
    by_name = {name: owners[0].nbytes for each in tensors for name, owners in each.items()}
    constants = sum(size for name, size in by_name.items() if name.endswith(SCALES))
    trained = [any(parameter.requires_grad for parameter in module.parameters()) for module in modules]
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    below = any(
        parameter.requires_grad and id(parameter) not in inside and not in_head(name, loaded.head_names)
        for name, parameter in loaded.model.named_parameters()
    )
    lowest = 0 if below else trained.index(True) if any(trained) else len(sizes)
    return OffloadedBlocks(
        config.to, sum(by_name.values()) - constants, constants, max(map(sum, itertools.pairwise(sizes))),
        sum(sizes), sum(sizes[lowest:-AT_ONCE]),
    )  # fmt: skip
