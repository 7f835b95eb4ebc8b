"""Full finetuning: every weight is trained (Devlin et al. 2018, arXiv:1810.04805, for encoders).

The figure to beat, and the choice when memory is no concern; the export is a whole model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from peftkit.errors import MethodError
from peftkit.schema.method import Method
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from peftkit.schema.recipe import Recipe


@METHODS.register("full")
class Full(Method):
    """Every weight (Devlin et al. 2018, arXiv:1810.04805)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1810.04805"
    default_learning_rate: ClassVar[float] = 5e-5
    saves: ClassVar[Literal["adapter", "model"]] = "model"

    kind: Literal["full"] = "full"

    def check(self, recipe: Recipe) -> None:
        """Quantized weights cannot be trained."""
        if recipe.quantization is not None:
            raise MethodError(
                "method.kind=full trains the base's own weights, which cannot be quantized; set quantization=null, "
                "or use method.kind=lora"
            )

    def apply(self, loaded: LoadedModel) -> None:
        """Sets ``requires_grad`` on every floating-point weight."""
        for parameter in loaded.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
