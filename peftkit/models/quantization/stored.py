"""What the files of a checkpoint that bitsandbytes saved hold: which layers are packed, and in what blocks.

A packed layer has its scales beside its weight: ``X.weight.absmax`` in 4 bits, ``X.SCB`` in 8. The config alone does
not tell: a backbone that was saved without a head leaves ``llm_int8_skip_modules`` empty, and whoever puts a head on it
would have that quantized as well.

    skipped = never_packed(model, heads, others, folder)        # names of layers that stay whole
    config.quantization_config = settled(config.quantization_config, skipped, torch.bfloat16)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SCALES_4BIT, SCALES_8BIT, STATE = ".weight.absmax", ".SCB", ".weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Blocks:
    """How a 4-bit checkpoint shares its scales out."""

    size: int
    """Weights to a scale."""
    outer: int | None
    """Scales to a scale of theirs; None where they are not quantized."""


def never_packed(model: Any, heads: Sequence[str], others: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Names of modules of a model that must not be packed when a checkpoint is loaded into it.

    Args:
        model: on the meta device, its layers not replaced yet.
        heads: modules that are trained, and so never packed.
        others: modules that are not packed unless the files hold them so (output embeddings, a pooler, what the
            config names).
        folder: where the checkpoint lies; where its files have not been fetched, nothing more is known.
    """
    from torch import nn

    names = {name for name, _ in _keys(folder)}
    packed = {name.removesuffix(end) for end in (SCALES_4BIT, SCALES_8BIT) for name in names if name.endswith(end)}
    whole = {name.removesuffix(".weight") for name in names if name.endswith(".weight")} - packed
    prefix = f"{model.base_model_prefix}."  # files of a backbone alone leave it out

    def held(name: str, within: set[str]) -> bool:
        return bool({name, name.removeprefix(prefix)} & within)

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = [
        name for name in others if not any(held(one, packed) for one in linears if f"{one}.".startswith(f"{name}."))
    ]
    return tuple(dict.fromkeys([*heads, *kept, *(name for name in linears if held(name, whole))]))


def blocks(folder: Path) -> Blocks | None:
    """How the scales of a 4-bit checkpoint are shared out; None where its files have not been fetched."""
    for name, file in _keys(folder):
        if STATE in name:
            from safetensors import safe_open

            with safe_open(file, framework="np") as opened:
                held = json.loads(opened.get_tensor(name).tobytes())
            return Blocks(int(held["blocksize"]), held.get("nested_blocksize"))
    return None


def settled(held: Mapping[str, Any], skipped: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """The checkpoint's quantization config for this run: what stays whole, and the dtype of 4-bit products."""
    compute = str(dtype).removeprefix("torch.")
    return {**held, "llm_int8_skip_modules": list(skipped), "bnb_4bit_compute_dtype": compute}


def _keys(folder: Path) -> Iterator[tuple[str, Path]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            names = list(opened.keys())
        yield from ((name, file) for name in names)
