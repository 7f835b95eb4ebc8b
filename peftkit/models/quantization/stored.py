"""How quantized weights are stored: their sizes, and which layers a checkpoint saved by bitsandbytes quantizes.

A quantized layer is stored with its scales: ``X.weight.absmax`` in 4 bits, ``X.SCB`` in 8. The config is not enough: a
backbone saved without a head has an empty ``llm_int8_skip_modules``, and a head added to it would be quantized as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

SCALES_4BIT, SCALES_8BIT, STATE = ".weight.absmax", ".SCB", ".weight.quant_state.bitsandbytes__"
TABLES = 16 * 4 + 256 * 4 + 4
"""Bytes of the lookup tables and the offset that double quantization stores with each weight."""


@dataclass(frozen=True)
class WeightFormat:
    """How a quantization stores a matrix."""

    kind: str
    double: bool = False
    block: int = 64  # weights per scale, in 4 bits
    outer: int = 256  # scales per scale of the scales

    def weight_bytes(self, weights: int) -> int:
        """Bytes of the packed weights."""
        return (weights + 1) // 2 if self.kind == "nf4" else weights

    @property
    def table_bytes(self) -> int:
        """Bytes of a matrix's lookup tables, which its constants include."""
        return 0 if self.kind == "int8" else TABLES if self.double else 16 * 4

    def scale_bytes(self, rows: int, columns: int) -> tuple[int, ...]:
        """Bytes of each tensor of scales of a matrix, [rows, columns]."""
        if self.kind == "int8":
            return (4 * rows,)
        blocks = -(-rows * columns // self.block)
        return (blocks, 4 * -(-blocks // self.outer)) if self.double else (4 * blocks,)

    def constant_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the scales and tables of a matrix, [rows, columns]."""
        return sum(self.scale_bytes(rows, columns)) + self.table_bytes


def never_packed(model: Any, heads: Sequence[str], others: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Names of the modules that must not be quantized when a checkpoint is loaded into a model on the meta device.

    Args:
        heads: modules that are trained, and therefore never quantized.
        others: modules that are not quantized unless the files contain them so (output embeddings, a pooler, what the
            config names).
        folder: of the checkpoint; if its files have not been downloaded, only ``heads`` and ``others`` are known.
    """
    from torch import nn

    keys = {key for key, _ in tensor_keys(folder)}
    packed = {key.removesuffix(end) for end in (SCALES_4BIT, SCALES_8BIT) for key in keys if key.endswith(end)}
    unpacked = {key.removesuffix(".weight") for key in keys if key.endswith(".weight")} - packed
    prefix = f"{model.base_model_prefix}."  # the files of a backbone omit it

    def is_in(name: str, names: set[str]) -> bool:
        return bool({name, name.removeprefix(prefix)} & names)

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    unquantized = [
        name for name in others if not any(is_in(one, packed) for one in linears if f"{one}.".startswith(f"{name}."))
    ]
    return tuple(dict.fromkeys([*heads, *unquantized, *(name for name in linears if is_in(name, unpacked))]))


def nf4_format(folder: Path) -> WeightFormat | None:
    """The format of a 4-bit checkpoint's weights; None if its files have not been downloaded."""
    for key, path in tensor_keys(folder):
        if STATE in key:
            with safe_open(path, framework="np") as file:
                state = json.loads(file.get_tensor(key).tobytes())
            double = {"double": True, "outer": state["nested_blocksize"]} if state.get("nested_blocksize") else {}
            return WeightFormat("nf4", block=int(state["blocksize"]), **double)
    return None


def tensor_keys(folder: Path) -> Iterator[tuple[str, Path]]:
    """Each tensor's key with its file; nothing if the files have not been downloaded."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            keys = list(file.keys())
        yield from ((key, path) for key in keys)
