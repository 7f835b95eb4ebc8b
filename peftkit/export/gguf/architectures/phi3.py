"""Phi-3, Phi-3.5 mini and Phi-4: queries, keys and values in one matrix, gate and up projection in another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.export.gguf.architecture import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor


@ARCHITECTURES.register("phi3")
class Phi3(Architecture):
    """Phi-3 and Phi-4; LongRoPE's two sets of factors are written as tensors."""

    name: ClassVar[str] = "PHI3"

    @property
    def context_length(self) -> int:
        return min(super().context_length, self.config.sliding_window or super().context_length)

    @property
    def exact_context(self) -> int:
        """With LongRoPE, a larger context gets the long factors at once, short prompts included."""
        longrope = self.rope.get("rope_type") == "longrope"
        return int(self.config.original_max_position_embeddings) if longrope else self.context_length

    def unsupported_rope(self, rope: Mapping[str, Any]) -> str:
        return "" if rope.get("rope_type") == "longrope" else super().unsupported_rope(rope)

    def write_rope(self, writer: GGUFWriter) -> None:
        super().write_rope(writer)
        if self.rope.get("rope_type") != "longrope":
            return
        config = self.config
        original = config.original_max_position_embeddings
        stretch = config.max_position_embeddings / original
        default = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(self.rope.get("attention_factor") or default))

    def added_tensors(self) -> Iterator[tuple[str, Tensor]]:
        import torch

        if self.rope.get("rope_type") == "longrope":
            yield "rope_factors_long.weight", torch.tensor(self.rope["long_factor"], dtype=torch.float32)
            yield "rope_factors_short.weight", torch.tensor(self.rope["short_factor"], dtype=torch.float32)
