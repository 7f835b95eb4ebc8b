"""LayerNorm tuning: only scales and shifts of normalization layers are trained. Zhao et al. 2023, arXiv:2312.11420."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from peftkit.errors import MethodError
from peftkit.methods.peft_method import PeftMethod
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel, in_head


@METHODS.register("ln_tuning")
class LnTuning(PeftMethod):
    """Normalization layers only (Zhao et al. 2023, arXiv:2312.11420)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2312.11420"
    default_learning_rate: ClassVar[float] = 5e-3
    learns_pooling: ClassVar[bool] = False

    kind: Literal["ln_tuning"] = "ln_tuning"

    def peft_config(self, loaded: LoadedModel) -> Any:
        """peft's LNTuningConfig for every module with a weight whose class name contains "norm"."""
        from peft import LNTuningConfig

        norms = [
            name
            for name, module in loaded.model.named_modules()
            if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
            if not in_head(name, loaded.head_names)
        ]
        if not norms:
            raise MethodError(
                f"method.kind=ln_tuning: {type(loaded.model).__name__} has no normalization weights; use lora"
            )
        return LNTuningConfig(**self.shared_arguments(loaded), target_modules=norms)
