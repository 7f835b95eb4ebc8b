"""Merging an adapter into its base in memory, for inference: W + ΔW, without the adapter's own matmuls.

No file changes. Each weight is widened to fp32, peft merges its adapter into it, and the sum is rounded to the dtype
of the base: one rounding, like that of any weight in that dtype.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from peftkit.errors import MethodError
from peftkit.export import multi_adapter
from peftkit.export.native_adapters import native_adapters
from peftkit.models.offload import has_offloaded_blocks

MergeMode = Literal["auto"] | bool
MAX_LOSS = 0.5
"""Share of the adapter's change (in norm) above which rounding makes merging not worth it."""


@dataclass
class MergeState:
    """Whether the adapter of a loaded run is to be merged, and whether it was."""

    mode: MergeMode = "auto"
    """True: merge or raise; False: never; "auto": merge if it can be done with little loss."""
    merged: bool = False
    reason: str = ""
    """Why it was not merged."""

    def is_pending(self, model: Any) -> bool:
        """Whether the model should be merged before it is used: it has one adapter, and merging was not tried yet."""
        pending = self.mode is not False and not self.merged and not self.reason
        return pending and len(multi_adapter.names(model)) == 1

    def merge(self, model: Any, *, quantized: bool, reload: Callable[[], Any]) -> Any:
        """The model with its adapter merged, or unmerged if that is not possible; ``reason`` then says why.

        Args:
            reload: loads the model again, after a merge that failed halfway.

        Raises:
            MethodError: it cannot be merged, and ``mode`` is True.
        """
        loss, self.reason = 0.0, unmergeable_reason(model, quantized=quantized)
        if not self.reason:
            try:
                merged, loss = merge_in_memory(model)
            except MethodError as error:
                self.reason = str(error)
            if loss > MAX_LOSS and self.mode == "auto":
                self.reason = f"rounding would remove {loss:.0%} of what was learned"
            if not self.reason:
                self.merged = True
                return merged
            model = reload()
        if self.mode is True:
            raise MethodError(f"this run cannot be merged for inference: {self.reason}; leave merge at 'auto'")
        return model


def unmergeable_reason(model: Any, *, quantized: bool) -> str:
    """Why the only adapter of a model cannot be merged in memory; empty if it can."""
    if quantized:
        return "its base is quantized"
    if has_offloaded_blocks(model):
        return "the recipe's model.offload keeps its weights off the device"
    if native_adapters(model) is not None:
        return "its method changes the base's weights themselves, or adds layers of its own"
    if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
        return "its method puts learned tokens before the text"
    layers = _adapted_layers(model)
    if not all(hasattr(layer, "merge") for layer in layers):
        return "its method cannot be merged into the base"
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    if any(uses[id(parameter)] > 1 for layer in layers for parameter in layer.get_base_layer().parameters()):
        return "a weight that it adapts is shared with another layer"
    return ""


@torch.no_grad()
def merge_in_memory(model: Any) -> tuple[Any, float]:
    """Merges by peft's own code, each weight in fp32.

    Returns:
        The plain transformers model, and the share of the adapter's change lost to rounding (0 in fp32), as a ratio
        of norms.

    Raises:
        MethodError: peft cannot merge this adapter; the model is then unusable and must be loaded again.
    """
    rounded = changed = 0.0
    try:
        for layer in _adapted_layers(model):
            weights = dict(layer.get_base_layer().named_parameters())
            dtypes = {name: weight.dtype for name, weight in weights.items()}
            for weight in weights.values():
                weight.data = weight.data.float()
            before = {name: weight.data.clone() for name, weight in weights.items()}
            layer.merge(safe_merge=False)
            for name, weight in weights.items():
                change = weight.data - before[name]
                merged = weight.data.to(dtypes[name])
                rounded += float((merged.float() - weight.data).square().sum()) * bool(change.any())
                changed += float(change.square().sum())
                weight.data = merged
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they are merged already
            model = unwrap_heads(model.merge_and_unload())
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        raise MethodError(f"its method cannot be merged into the base ({error})") from error
    return model.eval().requires_grad_(False), math.sqrt(rounded / changed) if changed else 0.0


def unwrap_heads(merged: Any) -> Any:
    """Replaces peft's wrappers around trained heads, which some methods leave in a merged model, by the heads."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(merged.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, module.modules_to_save["default"])
    return merged


def _adapted_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
