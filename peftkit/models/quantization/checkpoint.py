"""Bases whose checkpoint holds quantized weights already: GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978), HQQ,
torchao, and what bitsandbytes saved. They are taken as frozen bases, as transformers loads them.

Everything here is read off ``config.json``: what cannot work is refused before a weight is fetched or read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from peftkit.errors import MethodError, ModelError

if TYPE_CHECKING:
    import torch

    from peftkit.recipe import Recipe


@dataclass(frozen=True)
class Kernels:
    """What a kind of quantized checkpoint runs on."""

    modules: tuple[str, ...]
    install: str
    needs_gpu: bool = False


KERNELS = {
    "awq": Kernels(("gptqmodel", "optimum"), "pip install optimum && pip install gptqmodel --no-build-isolation"),
    "bitsandbytes": Kernels(("bitsandbytes",), "pip install 'peftkit[quantization]'"),
    "gptq": Kernels(("gptqmodel", "optimum"), "pip install optimum && pip install gptqmodel --no-build-isolation"),
    "hqq": Kernels(("hqq",), "pip install hqq", needs_gpu=True),
    "torchao": Kernels(("torchao",), "pip install torchao"),
}
"""Kinds that transformers loads and peft's layers can stand on, by transformers' ``quant_method``."""


def quantized_with(config: Any) -> str | None:
    """The kind of quantization that a transformers config, or a config.json, declares; None for whole weights."""
    held = config.get("quantization_config") if isinstance(config, Mapping) else _of(config)
    if not held:
        return None
    return str(getattr(held.get("quant_method"), "value", held.get("quant_method")) or _by_flags(held))


def _of(config: Any) -> Mapping[str, Any] | None:
    held: Any = getattr(config, "quantization_config", None)
    return held.to_dict() if hasattr(held, "to_dict") else held


def _by_flags(held: Mapping[str, Any]) -> str:
    """Early bitsandbytes checkpoints have flags in place of a name."""
    return "bitsandbytes" if held.get("load_in_4bit") or held.get("load_in_8bit") else "an unnamed method"


def check(config: Any, recipe: Recipe, device: torch.device | str | None = None) -> str | None:
    """The kind of the checkpoint's quantization, None for whole weights.

    Raises:
        ModelError: it cannot be loaded here: no kernels (with the line that installs them), no GPU for those that need
            one, a kind that peft has no layers for, or a second quantization on top of it.
        MethodError: the method needs whole weights.
    """
    kind = quantized_with(config)
    if kind is None:
        return None
    source = recipe.model.source
    if kind not in KERNELS:
        known = ", ".join(KERNELS)
        raise ModelError(
            f"model.source={source}: its weights are quantized with {kind}, which no method here is trained over; "
            f"use the unquantized model with quantization.kind=nf4, or a checkpoint of {known}"
        )
    if recipe.quantization is not None:
        raise ModelError(
            f"model.source={source}: its weights are quantized with {kind} already; set quantization=null, or name the "
            "unquantized model"
        )
    _check_kernels(kind, source, device)
    if why := recipe.method.why_not_over(kind):
        raise MethodError(f"model.source={source} is quantized with {kind}: {why}")
    if recipe.export.merge:
        raise MethodError(
            f"export.merge: nothing can be merged into weights that {kind} has packed; set export.merge=false"
        )
    return kind


def _check_kernels(kind: str, source: str, device: torch.device | str | None) -> None:
    import torch

    kernels = KERNELS[kind]
    missing = [name for name in kernels.modules if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"model.source={source}: its weights are quantized with {kind}, whose kernels are not installed "
            f"({', '.join(missing)}); run `{kernels.install}`"
        )
    if kernels.needs_gpu and torch.device(device or "cpu").type == "cpu":
        raise ModelError(
            f"model.source={source}: weights quantized with {kind} are loaded on a GPU only, and this run is on the "
            "CPU; use the unquantized model with quantization.kind=nf4"
        )
