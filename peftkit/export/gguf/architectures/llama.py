"""Llama and models of its shape: Llama 2 and 3, SmolLM2, Mistral.

llama.cpp rotates neighboring dimensions (2i, 2i + 1) of a head in these, transformers the two halves (i, i + d/2): the
rows of the query and key projections are reordered, so that both compute the same scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peftkit.export.gguf.architecture import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    from torch import Tensor


@ARCHITECTURES.register("llama")
class Llama(Architecture):
    """Llama, SmolLM2 and others that transformers loads as LlamaForCausalLM."""

    name: ClassVar[str] = "LLAMA"

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        if ".q_proj." in name:
            return interleave(tensor, self.config.num_attention_heads)
        return interleave(tensor, self.config.num_key_value_heads) if ".k_proj." in name else tensor


@ARCHITECTURES.register("mistral")
class Mistral(Llama):
    """Mistral; llama.cpp attends to all earlier tokens, so the context ends with the sliding window."""

    @property
    def context_length(self) -> int:
        return min(super().context_length, self.config.sliding_window or super().context_length)


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Moves rows i and i + d/2 of each head next to each other."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
