"""The contract of a model architecture in GGUF: which keys llama.cpp reads, and how its weights differ.

A family is one file in ``peftkit.export.gguf.architectures``, or a class that another package names under the
entry-point group ``peftkit.gguf_architectures``. It is registered under the ``model_type`` of a transformers config.
Names of tensors come from the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.errors import MethodError
from peftkit.registry import Registry

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

ARCHITECTURES: Registry[type[Architecture]] = Registry(
    "GGUF architecture", package="peftkit.export.gguf.architectures", group="peftkit.gguf_architectures"
)


class Architecture:
    """How models of one ``model_type`` are written; the defaults are those of Llama-like decoders with RMSNorm."""

    name: ClassVar[str]
    """Of a member of ``gguf.MODEL_ARCH``."""
    activations: ClassVar[tuple[str, ...]] = ("silu", "swish")
    """Values of ``hidden_act`` that llama.cpp computes for this architecture."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    @property
    def rotated(self) -> int:
        """Dimensions of a head that carry a position."""
        return int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0))

    @property
    def context_length(self) -> int:
        """Tokens that the model reads at most as llama.cpp computes it."""
        return int(self.config.max_position_embeddings)

    @property
    def exact_context(self) -> int:
        """Size of llama.cpp's context up to which it computes as transformers does."""
        return self.context_length

    def unsupported_reason(self) -> str:
        """What of the config llama.cpp would compute differently; empty if nothing."""
        activation = self.config.hidden_act
        if activation not in self.activations:
            return f"hidden_act={activation}, where llama.cpp computes {self.activations[0]}"
        return self.unsupported_rope(self.rope)

    @property
    def rope(self) -> Mapping[str, Any]:
        """The rotary parameters of layers with full attention."""
        return getattr(self.config, "rope_parameters", None) or {}

    def unsupported_rope(self, rope: Mapping[str, Any]) -> str:
        """Why rotary parameters cannot be written; empty if they can."""
        kind = rope.get("rope_type", "default")
        if kind not in {"default", "linear", "llama3", "yarn"}:
            return f"rope_type={kind}, which is not written; expected default, linear, llama3 or yarn"
        changed = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
        return f"rope parameter {changed[0]}, which is not written" if kind == "yarn" and changed else ""

    def write_keys(self, writer: GGUFWriter) -> None:
        """Writes what llama.cpp needs to know beyond the weights and the vocabulary."""
        config = self.config
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        self.write_rope(writer)

    def write_rope(self, writer: GGUFWriter) -> None:
        """Writes the base of the rotary frequencies, and how they are stretched."""
        from gguf import RopeScalingType

        rope = self.rope
        writer.add_rope_dimension_count(self.rotated)
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        kind = rope.get("rope_type", "default")
        if kind in {"linear", "yarn"}:
            writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings") or self.config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(int(original))
            writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
            writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))

    def added_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(GGUF name, tensor) of what transformers computes and llama.cpp reads from the file."""
        if self.rope.get("rope_type") == "llama3":
            yield "rope_freqs.weight", self._frequency_divisors()

    def _frequency_divisors(self) -> Tensor:
        """θ_default / θ_scaled of each pair of dimensions, by transformers' own initialization."""
        import torch
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, "cpu")
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        return 1.0 / (float(self.rope["rope_theta"]) ** steps) / scaled

    def weight(self, name: str, tensor: Tensor) -> Tensor:
        """A weight or bias as llama.cpp stores it; ``name`` is transformers'."""
        return self.rows(name, tensor)

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """The outputs (first dimension) of a layer in llama.cpp's order; applies to the B of a LoRA as well."""
        return tensor

    def tensors(self, state: Mapping[str, Tensor], tied: bool) -> Iterator[tuple[str, Tensor]]:
        """(GGUF name, tensor) of each weight of a transformers model.

        Args:
            tied: whether the output layer is the embedding, of which llama.cpp then reads one copy.

        Raises:
            MethodError: llama.cpp's architecture has no place for a weight.
        """
        yield from self.added_tensors()
        for name, tensor in state.items():
            if not (tied and name == "lm_head.weight"):
                yield self.tensor_name(name), self.weight(name, tensor)

    def tensor_name(self, name: str) -> str:
        """The GGUF name of a weight of transformers; raises MethodError if there is none."""
        from gguf import MODEL_ARCH, get_tensor_name_map

        names = get_tensor_name_map(MODEL_ARCH[self.name], self.layers)
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise MethodError(
                f"llama.cpp's architecture {self.name.lower()} has no place for the weight {name} of this model"
            )
        return mapped


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers config.

    Raises:
        MethodError: it is not written as GGUF; lists those that are.
    """
    if config.model_type not in ARCHITECTURES:
        raise MethodError(
            f"GGUF is written for {', '.join(ARCHITECTURES)}; this base's model_type is '{config.model_type}'. Use "
            "--merge for a plain model, which llama.cpp's own converter may know"
        )
    architecture = ARCHITECTURES.get(config.model_type)(config)
    if reason := architecture.unsupported_reason():
        raise MethodError(f"this {config.model_type} model cannot be written as GGUF: its config has {reason}")
    return architecture
