"""(IA)³: trained vectors that scale keys, values and what enters the second feed-forward layer.

l_k ⊙ K, l_v ⊙ V, l_ff ⊙ γ(W₁x). Liu et al. 2022, arXiv:2205.05638.

    method: {kind: ia3}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.errors import MethodError
from peftkit.methods.targets import Names, PeftMethod, choose, linear_names, task_type, transposed
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    import torch


@METHODS.register("ia3")
class Ia3(PeftMethod):
    """Scaled keys, values and feed-forward activations (Liu et al. 2022, arXiv:2205.05638)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2205.05638"
    default_learning_rate: ClassVar[float] = 1e-2
    learns_pooling: ClassVar[bool] = False
    quantizations: ClassVar[tuple[str, ...] | None] = ("nf4", "int8")
    packed: ClassVar[tuple[str, ...] | None] = ("bitsandbytes",)

    kind: Literal["ia3"] = "ia3"
    target_modules: Names | None = None
    """Layers whose output, or for feed-forward ones input, is scaled: names, or one regular expression. None takes
    keys, values and the second feed-forward layer as peft knows them for the architecture."""
    feedforward_modules: Names | None = None
    """Those of the targets whose input is scaled; None takes peft's choice, or none where target_modules is given."""

    def config(self, loaded: LoadedModel) -> Any:
        """peft's IA3Config; raises MethodError for an architecture that peft has no choice for."""
        from peft import IA3Config

        names = [name for name in linear_names(loaded.model) if not set(name.split(".")) & set(loaded.head_names)]
        wanted, inner = self._wanted(loaded)
        targets = choose("target_modules", wanted, names)
        forward = choose("feedforward_modules", inner, targets) if inner else []
        return IA3Config(
            task_type=task_type(loaded),
            target_modules=targets,
            feedforward_modules=forward,
            modules_to_save=list(loaded.head_names) or None,
            fan_in_fan_out=transposed(loaded.model, targets),
        )

    def decays(self, name: str, parameter: torch.Tensor) -> bool:
        """The vectors start at 1, which decay would pull down."""
        return super().decays(name, parameter) and ".ia3_l." not in name

    def _wanted(self, loaded: LoadedModel) -> tuple[Any, Any]:
        from peft.utils.constants import (
            TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
        )
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

        if self.target_modules is not None:
            return self.target_modules, self.feedforward_modules
        known = loaded.model.config.model_type
        if known not in TARGETS:
            raise MethodError(
                f"method.kind=ia3: peft has no choice of modules for {known}; name those that give keys and values, "
                "and the second feed-forward layer, in method.target_modules and the latter in "
                "method.feedforward_modules"
            )
        return tuple(TARGETS[known]), self.feedforward_modules or tuple(FEEDFORWARD.get(known, ()))
