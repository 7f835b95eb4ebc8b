"""Frozen backbone: only the classifier's head is trained, on features that can be computed once."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from peftkit.methods.peft_method import NO_TARGET, PeftMethod
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel


@METHODS.register("frozen")
class Frozen(PeftMethod):
    """Head only (linear probing; Alain & Bengio 2016, arXiv:1610.01644)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1610.01644"
    default_learning_rate: ClassVar[float] = 5e-3
    adapts_backbone: ClassVar[bool] = False
    learns_pooling: ClassVar[bool] = False

    kind: Literal["frozen"] = "frozen"

    def peft_config(self, loaded: LoadedModel) -> Any:
        """A LoraConfig that adapts nothing and trains the head, so that the export is a small peft adapter."""
        from peft import LoraConfig

        return LoraConfig(**self.shared_arguments(loaded), target_modules=NO_TARGET)
