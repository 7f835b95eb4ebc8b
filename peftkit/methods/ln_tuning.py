"""LayerNorm tuning: the scales and shifts of the normalization layers are trained. Zhao et al. 2023, arXiv:2312.11420.

method: {kind: ln_tuning}
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from peftkit.errors import MethodError
from peftkit.methods.targets import PeftMethod, task_type
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel


@METHODS.register("ln_tuning")
class LnTuning(PeftMethod):
    """Normalization layers only (Zhao et al. 2023, arXiv:2312.11420)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2312.11420"
    default_learning_rate: ClassVar[float] = 5e-3
    learns_pooling: ClassVar[bool] = False

    kind: Literal["ln_tuning"] = "ln_tuning"

    def config(self, loaded: LoadedModel) -> Any:
        """peft's LNTuningConfig over every module that is called a norm and has a weight."""
        from peft import LNTuningConfig

        norms = [
            name
            for name, module in loaded.model.named_modules()
            if "norm" in type(module).__name__.lower()
            and getattr(module, "weight", None) is not None
            and not set(name.split(".")) & set(loaded.head_names)
        ]
        if not norms:
            raise MethodError(f"method.kind=ln_tuning: {type(loaded.model).__name__} has no normalization weights")
        return LNTuningConfig(
            task_type=task_type(loaded), target_modules=norms, modules_to_save=list(loaded.head_names) or None
        )
