"""What a model is made of, and what of it is trained: the table shown before training starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

ADAPTER_MARKS = ("lora_",)


@dataclass(frozen=True)
class TablePart:
    """One line of the table."""

    part: str
    """embeddings, attention, …: the module's place with its block number left out."""
    parameters: int
    """How many numbers; of quantized weights the numbers they stand for."""
    trainable: bool
    dtype: str
    bytes: int
    """Bytes held, without gradients and optimizer states."""


def trainable_table(model: nn.Module) -> list[TablePart]:
    """One line for each part, trainability and dtype, in the model's order."""
    rows: dict[tuple[str, bool, str], tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        count, size = _numbers(parameter), parameter.numel() * parameter.element_size()
        key = (_part(name), parameter.requires_grad, _dtype(parameter))
        old = rows.get(key, (0, 0))
        rows[key] = (old[0] + count, old[1] + size)
    return [TablePart(part, count, trainable, dtype, size) for (part, trainable, dtype), (count, size) in rows.items()]


def counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    rows = trainable_table(model)
    return sum(row.parameters for row in rows if row.trainable), sum(row.parameters for row in rows)


def _part(name: str) -> str:
    """``base_model.model.bert.encoder.layer.3.output.dense.lora_A.default.weight`` → ``bert.encoder.layer (lora)``."""
    steps = name.split(".")
    mark = next((" (lora)" for step in steps if step.startswith(ADAPTER_MARKS)), "")
    dropped = {"base_model", "model", "modules_to_save", "default", "base_layer"}
    if "bottleneck_adapters" in steps:
        mark = " (bottleneck)"
    if "original_module" in steps:
        mark = " (replaced, kept frozen)"
    path: list[str] = []
    for step in steps[:-1]:
        if step.isdigit():
            break
        if step not in dropped and step != "original_module" and not step.startswith(ADAPTER_MARKS):
            path.append(step)
    return ".".join(path[:3] or steps[-1:]) + mark


def _numbers(parameter: Any) -> int:
    """4-bit weights lie two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())


def _dtype(parameter: Any) -> str:
    state = getattr(parameter, "quant_state", None)
    return state.quant_type if state is not None else str(parameter.dtype).removeprefix("torch.")
