"""Activations that are formed again in the backward pass in place of being kept (Chen et al. 2016, arXiv:1604.06174).

full: a block keeps its input alone, and all of it is computed a second time. selective: the results of matrix products
are kept as well (Korthikanti et al. 2022, arXiv:2205.05198), so that only what is cheap is computed twice:
normalization, activation functions, dropout, softmax, the opening of quantized weights.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from peftkit.models.kernels import lora_linear

PRODUCTS = frozenset({"mm", "addmm", "linear", "_scaled_mm", "_int_mm", "_grouped_mm"})
"""Products with weights, by torch's names; those of queries and keys grow with the square of the length."""
FUSED_ATTENTION = "_scaled_dot_product_"
QUANTIZED_PRODUCTS = frozenset({"gemv_4bit", "gemm_4bit", "int8_linear_matmul", "int8_scaled_mm"})
"""bitsandbytes' own, which open the weights inside."""


def checkpoint_activations(model: Any, mode: str) -> None:
    """Switches a transformers (or peft) model's checkpointing on: ``full`` or ``selective``; ``off`` leaves it off."""
    if mode == "off":
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        arguments["context_fn"] = selective_contexts
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def selective_contexts() -> tuple[_Selective, _Selective]:
    """The two contexts of ``torch.utils.checkpoint``: around the forward pass, and around its repetition."""
    keep, reuse = create_selective_checkpoint_contexts(policy)
    return _Selective(keep), _Selective(reuse)


def policy(_: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    """Keep what products with weights and fused attentions give, form the rest again.

    What draws random numbers is always formed again: left out of the repetition, it would shift the numbers that all
    later dropouts draw.
    """
    schema = getattr(operation, "_schema", None)
    name = schema.name.partition("::")[2] if schema else ""
    kept = name in PRODUCTS | QUANTIZED_PRODUCTS or (
        name.startswith(FUSED_ATTENTION) and not _given(schema, "dropout_p", arguments, named)
    )
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _given(schema: Any, wanted: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The value of an operation's argument, None where it is at its default."""
    for place, argument in enumerate(schema.arguments):
        if argument.name == wanted:
            return arguments[place] if place < len(arguments) else named.get(wanted)
    return None


class _Selective:
    """torch's context, within which the low-rank kernel leaves the products that it is given as they are."""

    def __init__(self, inner: torch.utils._python_dispatch.TorchDispatchMode) -> None:
        self._inner = inner

    def __enter__(self) -> None:
        self._token = lora_linear.PRODUCTS_ARE_KEPT.set(True)
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)
        lora_linear.PRODUCTS_ARE_KEPT.reset(self._token)
