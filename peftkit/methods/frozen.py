"""Frozen backbone: only the classifier's head is trained (linear probing; Alain & Bengio 2016, arXiv:1610.01644).

With no dropout below the head the features of a text never change, so they can be computed once.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from peftkit.schema.method import Method
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

NO_TARGET = "dummy-target-modules"
"""peft's own word for an adapter that wraps no module; the head travels as a module saved in full."""


@METHODS.register("frozen")
class Frozen(Method):
    """Head only (linear probing; Alain & Bengio 2016, arXiv:1610.01644)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1610.01644"
    default_learning_rate: ClassVar[float] = 5e-3
    adapts_backbone: ClassVar[bool] = False
    learns_pooling: ClassVar[bool] = False

    kind: Literal["frozen"] = "frozen"

    def apply(self, loaded: LoadedModel) -> None:
        """Leaves gradients to the head, in peft's format so that the export is a small adapter."""
        from peft import LoraConfig, get_peft_model

        from peftkit.methods.targets import task_type

        config = LoraConfig(
            task_type=task_type(loaded), target_modules=NO_TARGET, modules_to_save=list(loaded.head_names)
        )
        loaded.model = get_peft_model(loaded.model, config)
