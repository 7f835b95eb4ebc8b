"""What a model is made of and which part of it is trained: the table that is shown before training."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import nn

WRAPPERS = {"base_model", "model", "modules_to_save", "default", "base_layer", "original_module"}
"""Parts of a parameter's name that peft adds."""


@dataclass(frozen=True)
class TablePart:
    """One row of the table."""

    part: str  # the parameters' path without block numbers: ``bert.embeddings``, ``bert.encoder.layer``, …
    parameters: int  # of quantized weights, the number before packing
    trainable: bool
    dtype: str
    bytes: int  # size in memory, without gradients and optimizer states


def trainable_table(model: nn.Module) -> list[TablePart]:
    """One row per part, trainability and dtype, in the model's order."""
    rows: dict[tuple[str, bool, str], tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)  # 4-bit weights are stored two per byte
        count = int(state.shape.numel()) if state is not None else parameter.numel()
        dtype = state.quant_type if state is not None else str(parameter.dtype).removeprefix("torch.")
        key = (_part(name), parameter.requires_grad, dtype)
        parameters, size = rows.get(key, (0, 0))
        rows[key] = (parameters + count, size + parameter.numel() * parameter.element_size())
    return [TablePart(part, count, trainable, dtype, size) for (part, trainable, dtype), (count, size) in rows.items()]


def _part(name: str) -> str:
    """``base_model.model.bert.encoder.layer.3.output.dense.lora_A.default.weight`` → ``bert.encoder.layer (lora)``."""
    steps = name.split(".")
    suffix = " (lora)" if ".lora_" in name else ""
    if "bottleneck_adapters" in steps:
        suffix = " (bottleneck)"
    if "original_module" in steps:
        suffix = " (replaced, kept frozen)"
    above_blocks = itertools.takewhile(lambda step: not step.isdigit(), steps[:-1])
    path = [step for step in above_blocks if step not in WRAPPERS and not step.startswith("lora_")]
    return ".".join(path[:3] or steps[-1:]) + suffix
