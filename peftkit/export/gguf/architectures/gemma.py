"""Gemma 1, 2 and 3 (text): norms that scale by 1 + w, soft caps on logits, and sliding windows in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.export.gguf.architecture import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

LARGEST = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the one size of each generation whose attention llama.cpp scales by hidden size / heads."""


@ARCHITECTURES.register("gemma")
class Gemma(Architecture):
    """Gemma 1."""

    name: ClassVar[str] = "GEMMA"
    activations: ClassVar[tuple[str, ...]] = ("gelu_pytorch_tanh", "gelu_new")

    def unsupported_reason(self) -> str:
        activation = getattr(self.config, "hidden_activation", None) or self.config.hidden_act
        if activation not in (*self.activations, "gelu"):  # transformers reads Gemma 1's "gelu" as the tanh form
            return f"hidden_activation={activation}, where llama.cpp computes {self.activations[0]}"
        return self.unsupported_rope(self.rope)

    def weight(self, name: str, tensor: Tensor) -> Tensor:
        return tensor + 1 if name.endswith("norm.weight") else self.rows(name, tensor)


@ARCHITECTURES.register("gemma2")
class Gemma2(Gemma):
    """Gemma 2."""

    name: ClassVar[str] = "GEMMA2"
    pattern: ClassVar[int] = 2
    """Every pattern-th layer attends to all tokens, the others to a window."""

    def unsupported_reason(self) -> str:
        config = self.config
        if config.hidden_activation not in self.activations:
            return f"hidden_activation={config.hidden_activation}, where llama.cpp computes {self.activations[0]}"
        full = [(layer + 1) % self.pattern == 0 for layer in range(self.layers)]
        if [kind == "full_attention" for kind in config.layer_types] != full:
            return f"layer_types other than full attention in every {self.pattern}th layer"
        largest = self.layers == LARGEST[config.model_type]
        scale = config.hidden_size // config.num_attention_heads if largest else self.head_dim
        if config.query_pre_attn_scalar != scale:
            return f"query_pre_attn_scalar={config.query_pre_attn_scalar}, where llama.cpp takes {scale}"
        return self.unsupported_rope(self.rope)

    def write_keys(self, writer: GGUFWriter) -> None:
        super().write_keys(writer)
        writer.add_sliding_window(self.config.sliding_window)
        if self.config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(self.config.attn_logit_softcapping)
        if self.config.final_logit_softcapping:
            writer.add_final_logit_softcapping(self.config.final_logit_softcapping)


@ARCHITECTURES.register("gemma3_text")
class Gemma3(Gemma2):
    """Gemma 3, text only: layers with a window have rotary frequencies of their own."""

    name: ClassVar[str] = "GEMMA3"
    pattern: ClassVar[int] = 6

    @property
    def rope(self) -> Mapping[str, Any]:
        return self.config.rope_parameters["full_attention"]  # type: ignore[no-any-return]

    def unsupported_reason(self) -> str:
        if self.config.attn_logit_softcapping or self.config.final_logit_softcapping:
            return "soft caps on logits, which llama.cpp does not compute for Gemma 3"
        if self.config.rope_parameters["sliding_attention"].get("rope_type", "default") != "default":
            return "scaled rotary frequencies in layers with a window"
        return super().unsupported_reason()

    def write_rope(self, writer: GGUFWriter) -> None:
        super().write_rope(writer)
        writer.add_rope_freq_base_swa(float(self.config.rope_parameters["sliding_attention"]["rope_theta"]))
