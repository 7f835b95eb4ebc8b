"""What both quantizations need: loading, gradients that stay correct, and dequantized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from peftkit.errors import ModelError
from peftkit.schema.quantization import Quantization

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftkit.schema.recipe import ModelConfig

Dequantize = Callable[["torch.dtype"], "torch.Tensor"]


def is_installed() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def optimizers() -> Any:
    """The module ``bitsandbytes.optim``."""
    from bitsandbytes import optim

    return optim


class BitsAndBytes(Quantization):
    """A quantization that bitsandbytes implements, on CUDA and on the CPU."""

    def load_arguments(self, model: ModelConfig, head_names: Sequence[str]) -> dict[str, Any]:
        """See ``Quantization.load_arguments``; raises ModelError where bitsandbytes is missing."""
        import torch
        from transformers import BitsAndBytesConfig

        from peftkit.models.dtypes import dtype_for

        if not is_installed():
            raise ModelError(
                f"quantization.kind={self.kind} needs bitsandbytes: run `pip install 'peftkit[quantization]'`"
            )
        compute_dtype = dtype_for(model, "cuda" if torch.cuda.is_available() else "cpu")
        return {"quantization_config": BitsAndBytesConfig(**self.config_arguments(compute_dtype, head_names))}


def keep_gradients(model: nn.Module) -> None:
    """Prevents quantized layers from switching to a kernel without a backward pass.

    On processors with AVX512-BF16, ``bitsandbytes.nn.Linear4bit`` repacks its weight at its first evaluation without
    gradients, for a faster kernel that has no backward pass: training afterwards silently gets wrong gradients. Its
    attribute ``support_avx512bf16_for_cpu`` decides. gptqmodel's layers do the same in half precision if their first
    pass is an evaluation, and record that in ``linear_mode``. This can go once both libraries switch back in training.
    """
    for module in model.modules():
        layer: Any = module
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
        if getattr(layer, "linear_mode", "") is None:
            layer.linear_mode = "train"


def dequantizer(layer: Any) -> Dequantize | None:
    """A function that returns a 4-bit layer's weight, [out, in], in a dtype, anew at every call; None for other layers.

    With it, a LoRA layer multiplies by the weight itself: bitsandbytes' forward returns a view that must be copied
    before anything is added to it, and its gradient separately. Dequantizing takes a few percent of a matmul. A layer
    that bitsandbytes has repacked for its evaluation kernel has no such function.
    """
    own: Dequantize | None = getattr(layer, "dequantize_weight", None)  # of a layer without data, see meta_layers
    if own is not None:
        return own
    if type(layer).__name__ != "Linear4bit":  # the name first: bitsandbytes is slow to import, and often not installed
        return None
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    state = getattr(layer.weight, "quant_state", None)
    if type(layer) is not Linear4bit or state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    return lambda dtype: dequantize_4bit(layer.weight.data, state).to(dtype)


def quantization_constants(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Scales of a quantized layer, and other tensors over its weight's bytes, by the names that its files have.

    They are attributes of bitsandbytes' own objects, and neither parameters nor buffers. Lookup tables are left out.
    """
    weight, int8 = getattr(layer, "weight", None), getattr(layer, "state", None)
    state: Any = getattr(weight, "quant_state", None)
    if hasattr(state, "absmax"):  # a layer without data has none
        yield "weight.absmax", state.absmax
        if state.nested:
            yield "weight.nested_absmax", state.state2.absmax
    for owner in (weight, int8):
        for name in ("CB", "SCB"):
            tensor = getattr(owner, name, None)
            if tensor is not None and tensor.numel():
                yield name, tensor
