"""NF4: frozen linear weights in 4 bits, at the quantiles of a normal distribution (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from peftkit.models.quantization.bitsandbytes_support import BitsAndBytes
from peftkit.schema.registries import QUANTIZATIONS


@QUANTIZATIONS.register("nf4")
class NF4(BitsAndBytes):
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
