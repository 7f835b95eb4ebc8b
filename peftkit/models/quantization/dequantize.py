"""A 4-bit weight opened for one product: what the LoRA layers over it multiply by, in place of the layer's own forward.

bitsandbytes hands its product over in the dtype of the layer's input, as a view that must be copied before
anything is added to it, and its gradient apart from the adapter's. Opening takes a few hundredths of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Opener = Callable[["torch.dtype"], "torch.Tensor"]


def dequantizer(layer: Any) -> Opener | None:
    """What gives a 4-bit layer's weight as [out, in] in a dtype, anew at every call; None for any other layer.

    A layer that bitsandbytes has repacked for its own evaluation kernel is one of the others.
    """
    own = getattr(layer, "open_weight", None)  # a skeleton's
    if own is not None:
        return own  # type: ignore[no-any-return]
    if not _is_4bit(layer):
        return None
    state = getattr(layer.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None

    def opened(dtype: torch.dtype) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, state).to(dtype)

    return opened


def _is_4bit(layer: Any) -> bool:
    """Asks for the exact class, by name first: bitsandbytes is slow to import, and often not there."""
    if type(layer).__name__ != "Linear4bit":
        return False
    from bitsandbytes.nn import Linear4bit

    return type(layer) is Linear4bit
