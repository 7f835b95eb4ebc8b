"""Bases whose checkpoint holds quantized weights already: GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978), HQQ,
torchao, and what bitsandbytes saved. They are taken as frozen bases, as transformers loads them.

Everything here is read off ``config.json``: what cannot work is refused before a weight is fetched or read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from peftkit.errors import MethodError, ModelError
from peftkit.models.quantization import stored

if TYPE_CHECKING:
    import torch

    from peftkit.schema.recipe import ModelConfig, Recipe


@dataclass(frozen=True)
class Kernels:
    """What a kind of quantized checkpoint runs on."""

    modules: tuple[str, ...]
    install: str


KERNELS = {
    "awq": Kernels(("gptqmodel", "optimum"), "pip install optimum && pip install gptqmodel --no-build-isolation"),
    "bitsandbytes": Kernels(("bitsandbytes",), "pip install 'peftkit[quantization]'"),
    "gptq": Kernels(("gptqmodel", "optimum"), "pip install optimum && pip install gptqmodel --no-build-isolation"),
    "hqq": Kernels(("hqq",), "pip install hqq"),
    "torchao": Kernels(("torchao",), "pip install torchao"),
}
"""Kinds that transformers loads and peft's layers can stand on, by transformers' ``quant_method``."""


def quantized_with(config: Any) -> str | None:
    """The kind of quantization that a transformers config, or a config.json, declares; None for whole weights."""
    held = config.get("quantization_config") if isinstance(config, Mapping) else _of(config)
    if not held:
        return None
    return str(getattr(held.get("quant_method"), "value", held.get("quant_method")) or _by_flags(held))


def kind_of(model: ModelConfig) -> str | None:
    """The same of a recipe's base; of a hub's model its configuration alone is fetched.

    Raises:
        ModelError, HubError: there is no such base.
    """
    from peftkit.models.sources import check_config, folder_of, resolve

    return quantized_with(check_config(folder_of(resolve(model), weights=False)))


def _of(config: Any) -> Mapping[str, Any] | None:
    held: Any = getattr(config, "quantization_config", None)
    return held.to_dict() if hasattr(held, "to_dict") else held


def _by_flags(held: Mapping[str, Any]) -> str:
    """Early bitsandbytes checkpoints have flags in place of a name."""
    return "bitsandbytes" if held.get("load_in_4bit") or held.get("load_in_8bit") else "an unnamed method"


def check(config: Any, recipe: Recipe) -> str | None:
    """The kind of the checkpoint's quantization, None for whole weights; raises as ``check_recipe`` does, and
    ModelError where it cannot be loaded here (with the line that installs its kernels)."""
    kind = check_recipe(config, recipe)
    if kind is not None:
        _check_kernels(kind, recipe.model.source)
    return kind


def check_recipe(config: Any, recipe: Recipe) -> str | None:
    """The kind of the checkpoint's quantization, None for whole weights, whatever is installed here.

    Raises:
        ModelError: a kind that peft has no layers for, or a second quantization on top of it.
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
    if why := recipe.method.unsupported_checkpoint_reason(kind):
        raise MethodError(f"model.source={source} is quantized with {kind}: {why}")
    if recipe.export.merge:
        raise MethodError(
            f"export.merge: nothing can be merged into weights that {kind} has packed; set export.merge=false"
        )
    return kind


def settled(config: Any, kind: str, skipped: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """The checkpoint's quantization config for this run: kernels that have a backward pass, the run's own dtype.

    Args:
        skipped: names of modules that stay whole, as far as the kind is told by its config.
        dtype: of 4-bit products.
    """
    held = dict(config.quantization_config)
    if kind == "bitsandbytes":
        return stored.settled(held, skipped, dtype)
    if kind in ("gptq", "awq"):
        held["backend"] = "auto_trainable"  # left to itself gptqmodel takes the fastest, which may only infer
    return held


def _check_kernels(kind: str, source: str) -> None:
    kernels = KERNELS[kind]
    missing = [name for name in kernels.modules if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"model.source={source}: its weights are quantized with {kind}, whose kernels are not installed "
            f"({', '.join(missing)}); run `{kernels.install}`"
        )
    if kind == "hqq" and not _reads_hqq():
        raise ModelError(
            f"model.source={source}: its weights are quantized with hqq, which this version of transformers cannot "
            "load; use the unquantized model with quantization.kind=nf4"
        )


def _reads_hqq() -> bool:
    """Whether transformers puts HQQ's packed weights into a model: its version 5 lost that way of loading at first."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

    steps = ("get_load_operations", "get_weight_conversions")
    return any(getattr(HqqHfQuantizer, step) is not getattr(HfQuantizer, step, None) for step in steps)
