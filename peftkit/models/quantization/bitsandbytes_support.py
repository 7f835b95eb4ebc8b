"""What both quantizations need: bitsandbytes itself, and a 4-bit model's gradients kept right after an evaluation.

On processors with AVX512-BF16, bitsandbytes repacks the weights of a ``Linear4bit`` for a faster kernel the first time
it runs in evaluation mode without gradients. That kernel has no backward pass for the packed layout, and training that
goes on afterwards gets wrong gradients, silently. The layer decides by its attribute ``support_avx512bf16_for_cpu``.
gptqmodel's layers do the same in half precision, for good, where their first pass is one of evaluation: they remember
it in ``linear_mode``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from peftkit.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftkit.schema.recipe import ModelConfig

SWITCH = "support_avx512bf16_for_cpu"
MODE, TRAIN = "linear_mode", "train"


def is_installed() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def optimizers() -> Any:
    """The module ``bitsandbytes.optim``."""
    from bitsandbytes import optim

    return optim


def require_bitsandbytes(kind: str) -> None:
    """Raises ModelError with the line that installs bitsandbytes where it is missing."""
    if not is_installed():
        raise ModelError(f"quantization.kind={kind} needs bitsandbytes: run `pip install 'peftkit[quantization]'`")


def compute_dtype(model: ModelConfig) -> torch.dtype:
    """The dtype that 4-bit weights are opened to for a product, on the device that will be used."""
    import torch

    from peftkit.models.dtypes import dtype_for

    return dtype_for(model, "cuda" if torch.cuda.is_available() else "cpu")


def keep_gradients(model: nn.Module) -> int:
    """Forbids the repacking in every packed layer; returns in how many."""
    changed = 0
    for module in model.modules():
        if getattr(module, SWITCH, False):
            setattr(module, SWITCH, False)
            changed += 1
        if getattr(module, MODE, "") is None:
            setattr(module, MODE, TRAIN)
            changed += 1
    return changed
