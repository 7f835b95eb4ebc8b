"""The contract of a quantization: how the frozen weights are stored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftkit.schema.sections import ConfigSection

if TYPE_CHECKING:
    from peftkit.schema.recipe import ModelConfig


class Quantization(ConfigSection):
    """How the frozen weights are stored."""

    kind: str

    @abstractmethod
    def config_arguments(self, compute_dtype: Any, head_names: Sequence[str]) -> dict[str, Any]:
        """Arguments of transformers' ``BitsAndBytesConfig``; a fresh process proves exports with the same ones."""

    @abstractmethod
    def load_arguments(self, model: ModelConfig, head_names: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments for transformers' ``from_pretrained``; heads and embeddings stay unquantized."""
