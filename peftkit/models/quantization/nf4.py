"""NF4: frozen linear weights in 4 bits, at the quantiles of a normal distribution (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314), through bitsandbytes, on CUDA and on the CPU.

    quantization: {kind: nf4, double: true}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from peftkit.schema.quantization import Quantization
from peftkit.schema.registries import QUANTIZATIONS

if TYPE_CHECKING:
    from peftkit.schema.recipe import ModelConfig


@QUANTIZATIONS.register("nf4")
class NF4(Quantization):
    """4-bit NormalFloat, blocks of 64 weights to a scale (QLoRA, arXiv:2305.14314)."""

    kind: Literal["nf4"] = "nf4"
    double: bool = True
    """Quantize the scales as well: 0.127 bits a weight for them in place of 0.5."""

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
        from transformers import BitsAndBytesConfig

        from peftkit.models.quantization.bitsandbytes_support import compute_dtype, require_bitsandbytes

        require_bitsandbytes(self.kind)
        return {"quantization_config": BitsAndBytesConfig(**self.config_arguments(compute_dtype(model), head_names))}
