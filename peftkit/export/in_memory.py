"""An adapter merged into its base in memory, for inference: W + ΔW, without the adapter's own products.

    merging = Merging("auto")
    loaded.model = merging.merged(loaded.model, quantized=False)

Nothing on the disk changes. Each weight is widened to fp32, peft merges its adapter into it, and the sum is rounded to
the dtype in which the base is held: one rounding, as of any weight held in that dtype.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from peftkit.errors import MethodError
from peftkit.export import switching
from peftkit.export.weight_changes import deltas_of

Merge = Literal["auto"] | bool
LOST = 0.5
"""Share of the adapter's change (in norm) that may be lost to rounding before merging is no longer worth it."""


@dataclass
class Merging:
    """Whether a loaded run's adapter is to be merged for inference, and what came of it."""

    wanted: Merge = "auto"
    """True insists, False forbids, "auto" merges where it can be done and loses nothing that matters."""
    done: bool = False
    reason: str = ""
    """Why it was not merged."""

    def due(self, model: Any) -> bool:
        """Whether the model is to be merged before it is used: it has one adapter, and that was not tried yet."""
        return self.wanted is not False and not self.done and not self.reason and len(switching.names(model)) == 1

    def check(self, model: Any, *, quantized: bool) -> None:
        """Notes what stands against merging; raises MethodError where merging was insisted on."""
        self.reason = unmergeable_reason(model, quantized=quantized)
        self._insist()

    def refuse(self, reason: str) -> None:
        """Notes that merging failed; raises MethodError where it was insisted on."""
        self.reason = reason
        self._insist()

    def _insist(self) -> None:
        if self.reason and self.wanted is True:
            raise MethodError(f"this run cannot be merged for inference: {self.reason}; leave merge at 'auto'")


def unmergeable_reason(model: Any, *, quantized: bool) -> str:
    """Why a model's one adapter cannot be merged in memory; empty where it can."""
    if quantized:
        return "its base is quantized"
    if deltas_of(model) is not None:
        return "its method changes the base's weights themselves, or adds layers of its own"
    if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
        return "its method puts learned tokens before the text"
    layers = _layers(model)
    if not all(hasattr(layer, "merge") for layer in layers):
        return "its method cannot be merged into the base"
    seen = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    if any(seen[id(parameter)] > 1 for layer in layers for parameter in layer.get_base_layer().parameters()):
        return "a weight that it adapts is shared with another layer"
    return ""


@torch.no_grad()
def merge_in_memory(model: Any) -> tuple[Any, float]:
    """peft's merge, each weight widened to fp32 for it; returns the plain transformers model.

    Returns:
        The merged model, and the share of the adapter's change that rounding took (0 in fp32), as a ratio of norms.

    Raises:
        MethodError: peft cannot merge this adapter; the model given must then be loaded again.
    """
    rounded = changed = 0.0
    try:
        for layer in _layers(model):
            weights = dict(layer.get_base_layer().named_parameters())
            before = {name: weight.data for name, weight in weights.items()}
            for weight in weights.values():
                weight.data = weight.data.float()
            wide = {name: weight.data.clone() for name, weight in weights.items()}
            layer.merge(safe_merge=False)
            for name, weight in weights.items():
                change = weight.data - wide[name]
                held = weight.data.to(before[name].dtype)
                rounded += float((held.float() - weight.data).square().sum()) * bool(change.any())
                changed += float(change.square().sum())
                weight.data = held
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they are merged already
            merged = with_heads(model.merge_and_unload())
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        raise MethodError(f"its method cannot be merged into the base ({error})") from error
    return merged.eval().requires_grad_(False), math.sqrt(rounded / changed) if changed else 0.0


def with_heads(merged: Any) -> Any:
    """Puts trained heads in the place of peft's wrappers around them, which some methods leave standing."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(merged.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, module.modules_to_save["default"])
    return merged


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
