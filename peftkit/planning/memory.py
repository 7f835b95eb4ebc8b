"""Memory by part and phase of a run, whose peak is its largest phase.

weights      bytes of their dtype per parameter; NF4: ½ byte and scales; INT8: 1 byte and scales
gradients    4 bytes per trained parameter
states       AdamW 8 bytes per trained parameter, 8-bit AdamW 2 and scales, SGD 4, Adafactor a row and a column
activations  from a trace of forward and backward (``peftkit.planning.trace``)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peftkit.models.meta_layers import SCALES, TABLES
from peftkit.planning.offloading import OffloadedBlocks
from peftkit.planning.trace import Trace

BLOCK, SMALL = 256, 4096
"""8-bit states: numbers per scale, and the size below which a tensor's states stay in fp32."""


@dataclass(frozen=True)
class Phase:
    """Memory at the worst moment of a phase of the run."""

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class PersistentMemory:
    """Bytes that stay in memory between steps; gradients take as many as trained weights."""

    frozen: int
    constants: int
    trained: int
    states: int
    averages: int = 0
    blocks: int = 0
    """Of offloaded blocks, those that are on the device at a time; the others are not counted as frozen."""
    offloaded: int = 0
    """Bytes of all offloaded blocks, which are in memory while a CPU loads the model."""

    def parts(self) -> dict[str, int]:
        parts = {"frozen weights": self.frozen, "quantization constants": self.constants,
                 "trained weights": self.trained, "optimizer states": self.states}  # fmt: skip
        parts |= {"offloaded blocks": self.blocks} if self.blocks else {}
        return parts | ({"averaged weights": self.averages} if self.averages else {})


def persistent_memory(
    model: Any, optimizer: str, *, averaged: bool = False, offloaded: OffloadedBlocks | None = None
) -> PersistentMemory:
    """Memory of a model (with or without data; tied weights count once), its optimizer, and its averaged weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    constants = (SCALES, TABLES)
    scales = [b for name, b in model.named_buffers() if name.endswith(constants)]
    buffers = [b for name, b in model.named_buffers() if not name.endswith(constants)]
    states = sum(state_bytes(optimizer, tuple(p.shape)) for p in trained)
    size = _bytes(trained)
    weights, around, averages = _bytes([*frozen, *buffers]), _bytes(scales), size if averaged else 0
    if offloaded is None:
        return PersistentMemory(weights, around, size, states, averages)
    return PersistentMemory(
        weights - offloaded.weights, around - offloaded.constants, size, states, averages, offloaded.on_device,
        offloaded.weights + offloaded.constants,
    )  # fmt: skip


def state_bytes(optimizer: str, shape: tuple[int, ...]) -> int:
    """Bytes of an optimizer's states for one trained tensor."""
    count = math.prod(shape)
    if optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        return 2 * (count + 4 * -(-count // BLOCK)) if count >= SMALL else 8 * count
    if optimizer == "sgd":
        return 4 * count
    if optimizer == "adafactor":
        return 4 * (count // shape[-1] + count // shape[-2]) if len(shape) >= 2 else 4 * count
    return 8 * count


def plan_phases(
    persistent: PersistentMemory, train: Trace, evaluation: Trace, *, framework: int, loader: int, file: int,
    ratio: float, gpu: bool, kernels: int = 0,
) -> tuple[Phase, ...]:  # fmt: skip
    """The phases of a run.

    Args:
        train: of the micro-batches of a step; its bytes include the gradients that they leave.
        framework: bytes of the libraries.
        loader: bytes of tokenizer and data.
        file: bytes of the weight files, which are mapped while a CPU loads the model from them.
        ratio: bytes that the allocator takes per byte of activations, mapped blocks excepted.
        kernels: bytes of the kernels that a CPU's library caches for all shapes of micro-batches.
    """
    base = {"framework": framework, "loader": loader}
    weights = {name: size for name, size in persistent.parts().items() if name != "optimizer states"}
    full = {**base, **({"kernels": kernels} if kernels else {}), **persistent.parts()}
    # the trained weights, saved while their average is evaluated
    backup = {"copies": persistent.averages} if persistent.averages else {}
    parts = train.resident(ratio)
    gradients = min(persistent.trained, train.end, parts.get("activations", 0))
    if gradients:
        parts = {"gradients": gradients, **parts, "activations": parts["activations"] - gradients}

    def on_cpu(name: str, size: int) -> dict[str, int]:
        return {} if gpu else {name: size}

    return (
        Phase(
            "load",
            {**base, **weights, **on_cpu("weights to offload", persistent.offloaded), **on_cpu("weight files", file)},
        ),
        Phase("forward and backward", {**full, **parts}),
        Phase("optimizer step", {**full, "gradients": persistent.trained}),
        Phase("evaluation", {**full, **backup, **evaluation.resident(ratio)}),
        Phase("checkpoint", {**full, **on_cpu("copies", max(persistent.trained, persistent.states))}),
        Phase("export", {**full, **on_cpu("copies", persistent.trained)}),
    )


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
