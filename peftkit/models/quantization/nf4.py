"""NF4: frozen linear weights in 4 bits, at the quantiles of a normal distribution (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314). Uses bitsandbytes, on CUDA and on the CPU.

    quantization: {kind: nf4, double: true}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from peftkit.models.quantization.bitsandbytes_support import require_bitsandbytes
from peftkit.schema.quantization import Quantization
from peftkit.schema.registries import QUANTIZATIONS

if TYPE_CHECKING:
    from peftkit.schema.recipe import ModelConfig


@QUANTIZATIONS.register("nf4")
class NF4(Quantization):
    """4-bit NormalFloat, one scale per block of 64 weights (QLoRA, arXiv:2305.14314)."""

    kind: Literal["nf4"] = "nf4"
    double: bool = True
    """Quantize the scales as well: 0.127 bits per weight for them instead of 0.5."""

    def config_arguments(self, compute_dtype: Any, head_names: Sequence[str]) -> dict[str, Any]:
        """See ``Quantization.config_arguments``."""
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double,
            "bnb_4bit_compute_dtype": compute_dtype,
            "llm_int8_skip_modules": list(head_names),
        }

    def load_arguments(self, model: ModelConfig, head_names: Sequence[str]) -> dict[str, Any]:
        """See ``Quantization.load_arguments``; raises ModelError where bitsandbytes is missing."""
        import torch
        from transformers import BitsAndBytesConfig

        from peftkit.models.dtypes import dtype_for

        require_bitsandbytes(self.kind)
        compute_dtype = dtype_for(model, "cuda" if torch.cuda.is_available() else "cpu")
        return {"quantization_config": BitsAndBytesConfig(**self.config_arguments(compute_dtype, head_names))}
