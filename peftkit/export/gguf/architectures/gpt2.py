"""GPT-2: learned positions, LayerNorm with biases, and linear layers that transformers stores transposed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peftkit.export.gguf.architecture import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


@ARCHITECTURES.register("gpt2")
class GPT2(Architecture):
    """GPT-2 and others that transformers loads as GPT2LMHeadModel."""

    name: ClassVar[str] = "GPT2"
    activations: ClassVar[tuple[str, ...]] = ("gelu_new", "gelu_pytorch_tanh")

    def unsupported_reason(self) -> str:
        config = self.config
        if config.activation_function not in self.activations:
            return f"activation_function={config.activation_function}, where llama.cpp computes {self.activations[0]}"
        if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
            return "attention scores that are not divided by √d alone"
        return ""

    def write_keys(self, writer: GGUFWriter) -> None:
        config = self.config
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)

    def weight(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.T if name.endswith(TRANSPOSED) else tensor
