"""Full finetuning, of every weight or of the last k blocks: the base's own weights are trained.

    method: {kind: full}
    method: {kind: top_k, k: 2}

Full finetuning is the reference that other methods are compared with, for when memory is no concern. The export is a
complete model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from peftkit.errors import MethodError
from peftkit.methods.targets import in_head
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
        _refuse_quantization(self.kind, recipe)

    def apply(self, loaded: LoadedModel) -> None:
        """Sets ``requires_grad`` on every floating-point weight."""
        for parameter in loaded.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())


@METHODS.register("top_k")
class TopK(Method):
    """The last k blocks, the layers above them, and the head (Howard & Ruder 2018, arXiv:1801.06146)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1801.06146"
    default_learning_rate: ClassVar[float] = 1e-4
    saves: ClassVar[Literal["adapter", "model"]] = "model"

    kind: Literal["top_k"] = "top_k"
    k: Annotated[int, Field(ge=1)] = 2
    """Number of trained blocks, counted from the top."""

    def check(self, recipe: Recipe) -> None:
        """Quantized weights cannot be trained."""
        _refuse_quantization(self.kind, recipe)

    def apply(self, loaded: LoadedModel) -> None:
        """Sets ``requires_grad`` on the last k blocks and everything after them except tied output embeddings."""
        from peftkit.models.blocks import find_blocks

        model = loaded.model
        prefix, blocks = find_blocks(model)
        if self.k > len(blocks):
            raise MethodError(
                f"method.k={self.k}: the model has {len(blocks)} blocks; lower method.k, or use method.kind=full"
            )
        model.requires_grad_(False)
        for block in blocks[len(blocks) - self.k :]:
            block.requires_grad_(True)
        names = [name for name, _ in model.named_parameters()]
        last = max(index for index, name in enumerate(names) if name.startswith(f"{prefix}."))
        for name in names[last + 1 :]:
            model.get_parameter(name).requires_grad_(True)
        for parameter in model.get_input_embeddings().parameters():
            parameter.requires_grad_(False)  # and so for an output layer that is tied to it
        for name, parameter in model.named_parameters():
            if in_head(name, loaded.head_names):
                parameter.requires_grad_(True)


def _refuse_quantization(kind: str, recipe: Recipe) -> None:
    if recipe.quantization is not None:
        raise MethodError(
            f"method.kind={kind} trains the base's own weights, which cannot be quantized; set quantization=null, or "
            "use method.kind=lora"
        )
