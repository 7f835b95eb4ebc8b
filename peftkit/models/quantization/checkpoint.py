"""Frozen bases whose checkpoint is already quantized: GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978), HQQ, torchao,
bitsandbytes. Only ``config.json`` is read, so that what cannot work is refused before weights are downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from peftkit.errors import MethodError, ModelError

if TYPE_CHECKING:
    import torch

    from peftkit.schema.recipe import ModelConfig, Recipe


GPTQMODEL = (("gptqmodel", "optimum"), "pip install optimum && pip install gptqmodel --no-build-isolation")
KERNELS: dict[str, tuple[tuple[str, ...], str]] = {
    "awq": GPTQMODEL,
    "bitsandbytes": (("bitsandbytes",), "pip install 'peftkit[quantization]'"),
    "gptq": GPTQMODEL,
    "hqq": (("hqq",), "pip install hqq"),
    "torchao": (("torchao",), "pip install torchao"),
}
"""The kinds that transformers loads and peft supports: modules that their kernels need, and how to install them."""


def quantized_with(config: Any) -> str | None:
    """The quantization that a transformers config, or the content of a config.json, declares; None if unquantized."""
    mapping = isinstance(config, Mapping)
    values: Any = config.get("quantization_config") if mapping else getattr(config, "quantization_config", None)
    values = values.to_dict() if hasattr(values, "to_dict") else values
    if not values:
        return None
    method = values.get("quant_method")
    if method:
        return str(getattr(method, "value", method))
    # early bitsandbytes checkpoints have flags instead of a name
    return "bitsandbytes" if values.get("load_in_4bit") or values.get("load_in_8bit") else "an unnamed method"


def kind_of(model: ModelConfig) -> str | None:
    """``quantized_with`` of a recipe's base, of which only the configuration is downloaded."""
    from peftkit.models.sources import check_config, folder_of, resolve

    return quantized_with(check_config(folder_of(resolve(model), weights=False)))


def check(config: Any, recipe: Recipe) -> str | None:
    """``check_recipe``, which also raises ModelError if the kind cannot be loaded with the installed packages."""
    kind = check_recipe(config, recipe)
    if kind is None:
        return None
    modules, install = KERNELS[kind]
    what = f"model.source={recipe.model.source}: its weights are quantized with {kind}"
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ModelError(f"{what}, whose kernels are not installed ({', '.join(missing)}); run `{install}`")
    if kind == "hqq" and not _loads_hqq():
        raise ModelError(
            f"{what}, which this version of transformers cannot load; use the unquantized model with "
            "quantization.kind=nf4"
        )
    return kind


def check_recipe(config: Any, recipe: Recipe) -> str | None:
    """The kind of the checkpoint's quantization, None if unquantized, without regard to installed packages.

    Raises:
        ModelError: a kind that peft has no layers for, or a second quantization on top of it.
        MethodError: the method needs unquantized weights.
    """
    kind = quantized_with(config)
    if kind is None:
        return None
    source = recipe.model.source
    if kind not in KERNELS:
        raise ModelError(
            f"model.source={source}: its weights are quantized with {kind}, which no method supports; use the "
            f"unquantized model with quantization.kind=nf4, or a checkpoint of {', '.join(KERNELS)}"
        )
    if recipe.quantization is not None:
        raise ModelError(
            f"model.source={source}: its weights are already quantized with {kind}; set quantization=null, or use the "
            "unquantized model"
        )
    if reason := recipe.method.unsupported_checkpoint_reason(kind):
        raise MethodError(f"model.source={source} is quantized with {kind}: {reason}")
    if recipe.export.merge:
        raise MethodError(f"export.merge: {kind} weights cannot be merged with an adapter; set export.merge=false")
    return kind


def runtime_config(config: Any, kind: str, skipped: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """The checkpoint's quantization config with trainable kernels, the run's dtype, and modules left unquantized."""
    values = dict(config.quantization_config)
    if kind == "bitsandbytes":
        values |= {"llm_int8_skip_modules": list(skipped), "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    if kind in ("gptq", "awq"):
        values["backend"] = "auto_trainable"  # by default gptqmodel chooses the fastest, which may only infer
    return values


def _loads_hqq() -> bool:
    """Whether transformers loads HQQ's packed weights; the first releases of its version 5 do not."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

    steps = ("get_load_operations", "get_weight_conversions")
    return any(getattr(HqqHfQuantizer, step, None) is not getattr(HfQuantizer, step, None) for step in steps)
