"""Bytes by part and phase; the peak of a run is the largest of its phases.

weights      numbers × bytes of their dtype; NF4: ½ byte and its scales; INT8: 1 byte and its scales
gradients    4 bytes a trained number
states       AdamW 8 bytes a trained number, 8-bit AdamW 2 and its scales, SGD 4, Adafactor a row and a column
activations  from a trace of the pass (``peftkit.planning.trace``)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peftkit.models.quantization.meta_layers import SCALES
from peftkit.planning.trace import Traced

BLOCK, SMALL = 256, 4096
"""8-bit states: numbers to a scale, and the size below which a tensor's states stay in fp32."""


@dataclass(frozen=True)
class Phase:
    """What is held at the worst moment of a stretch of the run."""

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Held:
    """What stays in memory between steps."""

    frozen: int
    constants: int
    trained: int
    states: int
    gradients: int
    averages: int = 0

    def parts(self) -> dict[str, int]:
        """By name, gradients left out: they are there only within a step."""
        parts = {"frozen weights": self.frozen, "quantization constants": self.constants,
                 "trained weights": self.trained, "optimizer states": self.states}  # fmt: skip
        return parts | ({"averaged weights": self.averages} if self.averages else {})

    @property
    def persistent(self) -> int:
        """Weights, constants, adapters and optimizer states."""
        return sum(self.parts().values())


def held_by(model: Any, optimizer: str, *, averaged: bool = False) -> Held:
    """What a model (with or without data), its optimizer and an average of its trained weights hold; tied weights
    count once.
    """
    parameters = list({id(p): p for p in model.parameters()}.values())
    trained = [p for p in parameters if p.requires_grad]
    scales = [b for name, b in model.named_buffers() if name.endswith(SCALES)]
    other = [b for name, b in model.named_buffers() if not name.endswith(SCALES)]
    frozen = [p for p in parameters if not p.requires_grad]
    states = sum(state_bytes(optimizer, tuple(p.shape)) for p in trained)
    held = _bytes(trained)
    return Held(_bytes([*frozen, *other]), _bytes(scales), held, states, held, held if averaged else 0)


def state_bytes(optimizer: str, shape: tuple[int, ...]) -> int:
    """Bytes of an optimizer's states for one trained tensor."""
    count = 1
    for size in shape:
        count *= size
    if optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        return 2 * (count + 4 * -(-count // BLOCK)) if count >= SMALL else 8 * count
    if optimizer == "sgd":
        return 4 * count
    if optimizer == "adafactor":
        return 4 * (count // shape[-1] + count // shape[-2]) if len(shape) >= 2 else 4 * count
    return 8 * count


def phases(
    held: Held,
    train: Traced,
    evaluation: Traced,
    *,
    framework: int,
    loader: int,
    file: int,
    ratio: float,
    gpu: bool,
    kernels: int = 0,
) -> tuple[Phase, ...]:
    """The phases of a run.

    Args:
        train: a step's passes; gradients that they leave are among its bytes.
        framework, loader: bytes of the libraries, and of tokenizer and data.
        file: bytes of the weight files, which are mapped while the model is built from them on a CPU.
        ratio: what the allocator takes for each byte that is alive within a pass, mapped blocks apart.
        kernels: bytes of the kernels that a CPU's library keeps for the shapes of all passes.
    """
    base = {"framework": framework, "loader": loader}
    weights = {name: size for name, size in held.parts().items() if name != "optimizer states"}
    loading = {**base, **weights} | ({} if gpu else {"weight files": file})
    full = {**base, **({"kernels": kernels} if kernels else {}), **held.parts()}
    saved = max(held.trained, held.states)
    aside = {"copies": held.averages} if held.averages else {}  # the weights, while their average is evaluated
    parts = train.resident(ratio)
    gradients = min(held.gradients, train.end, parts.get("activations", 0))
    if gradients:
        parts = {"gradients": gradients, **parts, "activations": parts["activations"] - gradients}
    return (
        Phase("load", loading),
        Phase("forward and backward", {**full, **parts}),
        Phase("optimizer step", {**full, "gradients": held.gradients}),
        Phase("evaluation", {**full, **aside, **evaluation.resident(ratio)}),
        Phase("checkpoint", {**full, **({} if gpu else {"copies": saved})}),
        Phase("export", {**full, **({} if gpu else {"copies": held.trained})}),
    )


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
