"""(IA)³: trained vectors that scale keys, values and feed-forward activations: l_k ⊙ K, l_v ⊙ V, l_ff ⊙ γ(W₁x)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.errors import MethodError
from peftkit.methods import missed
from peftkit.methods.peft_method import PeftMethod
from peftkit.methods.targets import ModuleNames, fan_in_fan_out, linear_names, match_modules, matches
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
    quantized_checkpoints: ClassVar[tuple[str, ...] | None] = ("bitsandbytes",)

    kind: Literal["ia3"] = "ia3"
    target_modules: ModuleNames | None = None
    """Layers whose output, or input for feed-forward layers, is scaled: names, or one regular expression. None takes
    keys, values and the second feed-forward layer, as peft lists them for the architecture."""
    feedforward_modules: ModuleNames | None = None
    """The targets whose input is scaled; None takes peft's choice, or none where target_modules is given."""

    def peft_config(self, loaded: LoadedModel) -> Any:
        """peft's IA3Config; raises MethodError for an architecture that peft lists no modules for."""
        from peft import IA3Config
        from peft.utils import constants

        kind, feedforward = loaded.model.config.model_type, self.feedforward_modules
        patterns: Any = self.target_modules
        if patterns is None:
            patterns = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
            listed = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind)
            feedforward = feedforward or tuple(listed or ())
        if patterns is None:
            raise MethodError(
                f"method.kind=ia3: peft lists no modules for {kind}; set method.target_modules to the key, value and "
                "second feed-forward layers, and method.feedforward_modules to the latter"
            )
        names = linear_names(loaded.model, loaded.head_names)
        if self.target_modules is None and (unknown := [p for p in patterns if not any(matches(p, n) for n in names)]):
            raise MethodError(
                f"method.kind=ia3: peft lists {', '.join(patterns)} for {kind}, and this model has no linear layer "
                f"{', '.join(unknown)}; set method.target_modules to the key, value and second feed-forward layers"
            )
        targets = match_modules("target_modules", patterns, names)
        return IA3Config(
            **self.shared_arguments(loaded),
            target_modules=targets,
            feedforward_modules=match_modules("feedforward_modules", feedforward, targets) if feedforward else [],
            fan_in_fan_out=fan_in_fan_out(loaded.model, targets),
        )

    def missed(self, loaded: LoadedModel) -> list[str]:
        """Those of every method, and on weights that ``target_modules`` names but cannot select."""
        remarks, patterns = super().missed(loaded), self.target_modules
        return remarks if patterns is None else [*remarks, *missed.unselectable_weights(loaded.model, patterns)]

    def decays(self, name: str, parameter: torch.Tensor) -> bool:
        """No decay for the vectors, which start at 1."""
        return super().decays(name, parameter) and ".ia3_l." not in name
