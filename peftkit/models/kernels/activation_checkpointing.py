"""Activation checkpointing: recomputing activations in the backward pass (Chen et al. 2016, arXiv:1604.06174).

full: a block saves only its input and is computed a second time. selective: results of matmuls are saved as well
(Korthikanti et al. 2022, arXiv:2205.05198), so that only cheap operations are computed twice: normalization,
activation functions, dropout, softmax, the dequantization of weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from peftkit.models.kernels import lora_linear

MATMULS = frozenset({"mm", "addmm", "linear", "_scaled_mm", "_int_mm", "_grouped_mm"})
"""torch's matmuls with weights; not those of queries and keys, whose results grow with the square of the length."""
QUANTIZED_MATMULS = frozenset({"gemv_4bit", "gemm_4bit", "int8_linear_matmul", "int8_scaled_mm"})
"""bitsandbytes' own, which dequantize the weights."""
FUSED_ATTENTION = "_scaled_dot_product_"


def checkpoint_activations(model: Any, mode: str) -> None:
    """Enables the checkpointing of a transformers (or peft) model: ``full`` or ``selective``; ``off`` does nothing."""
    if mode != "off":
        contexts = {"context_fn": selective_contexts} if mode == "selective" else {}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **contexts})


def selective_contexts() -> tuple[_Selective, _Selective]:
    """The two contexts of ``torch.utils.checkpoint``: for the forward pass and for its recomputation."""
    save, reuse = create_selective_checkpoint_contexts(policy)
    return _Selective(save), _Selective(reuse)


def policy(_: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    """Saves the results of matmuls with weights and of fused attention; recomputes all else.

    What draws random numbers is always recomputed: skipping it would shift the random numbers of all later dropouts.
    """
    schema = getattr(operation, "_schema", None)
    name = schema.name.partition("::")[2] if schema else ""
    save = name in MATMULS | QUANTIZED_MATMULS
    if schema and name.startswith(FUSED_ATTENTION):
        values = dict(zip((argument.name for argument in schema.arguments), arguments)) | named
        save = not values.get("dropout_p")
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


class _Selective:
    """torch's context, in which the LoRA kernel does not change matmul results in place."""

    def __init__(self, inner: torch.utils._python_dispatch.TorchDispatchMode) -> None:
        self._inner = inner

    def __enter__(self) -> None:
        self._token = lora_linear.MATMULS_ARE_SAVED.set(True)
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        lora_linear.MATMULS_ARE_SAVED.reset(self._token)
