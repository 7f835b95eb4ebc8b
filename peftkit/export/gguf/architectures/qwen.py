"""Qwen2, Qwen2.5 and Qwen3: Llama's blocks with biases or normalized queries and keys."""

from __future__ import annotations

from typing import ClassVar

from peftkit.export.gguf.architecture import ARCHITECTURES, Architecture


@ARCHITECTURES.register("qwen2")
class Qwen2(Architecture):
    """Qwen2 and Qwen2.5; where some layers have a sliding window, the context ends with it."""

    name: ClassVar[str] = "QWEN2"

    @property
    def context_length(self) -> int:
        window = self.config.sliding_window if "sliding_attention" in self.config.layer_types else None
        return min(super().context_length, window or super().context_length)


@ARCHITECTURES.register("qwen3")
class Qwen3(Qwen2):
    """Qwen3 (dense): queries and keys are normalized per head."""

    name: ClassVar[str] = "QWEN3"
