"""INT8: frozen linear weights in 8 bits with one scale per row; outlier columns are multiplied separately (LLM.int8(),
Dettmers et al. 2022, arXiv:2208.07339).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from peftkit.models.quantization.bitsandbytes_support import BitsAndBytes
from peftkit.schema.registries import QUANTIZATIONS


@QUANTIZATIONS.register("int8")
class Int8(BitsAndBytes):
    """8-bit integers, outlier columns unquantized (LLM.int8(), arXiv:2208.07339)."""

    kind: Literal["int8"] = "int8"
    threshold: Annotated[float, Field(ge=0)] = 6.0
    """Magnitude from which an activation is an outlier, whose column is multiplied unquantized; 0 disables this."""

    def config_arguments(self, compute_dtype: Any, head_names: Sequence[str]) -> dict[str, Any]:
        """See ``Quantization.config_arguments``."""
        return {"load_in_8bit": True, "llm_int8_threshold": self.threshold, "llm_int8_skip_modules": list(head_names)}
