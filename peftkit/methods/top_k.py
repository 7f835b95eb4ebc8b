"""The top k transformer blocks and the head are trained, the rest stays frozen (Howard & Ruder 2018, arXiv:1801.06146).

method: {kind: top_k, k: 2}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from peftkit.errors import MethodError
from peftkit.schema.method import Method
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from peftkit.schema.recipe import Recipe


@METHODS.register("top_k")
class TopK(Method):
    """The last k blocks, what stands above them, and the head (Howard & Ruder 2018, arXiv:1801.06146)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1801.06146"
    default_learning_rate: ClassVar[float] = 1e-4
    saves: ClassVar[Literal["adapter", "model"]] = "model"

    kind: Literal["top_k"] = "top_k"
    k: Annotated[int, Field(ge=1)] = 2
    """Blocks that are trained, counted from the top."""

    def check(self, recipe: Recipe) -> None:
        """Quantized weights cannot be trained."""
        if recipe.quantization is not None:
            raise MethodError(
                "method.kind=top_k trains the base's own weights, which cannot be quantized; set quantization=null, "
                "or use method.kind=lora"
            )

    def apply(self, loaded: LoadedModel) -> None:
        """Sets ``requires_grad`` on the last k blocks and everything after them but tied output embeddings."""
        from peftkit.models.blocks import find_blocks

        model = loaded.model
        prefix, blocks = find_blocks(model)
        if self.k > len(blocks):
            raise MethodError(
                f"method.k={self.k}: the model has {len(blocks)} blocks; use at most that, or method.kind=full"
            )
        model.requires_grad_(False)
        for block in blocks[len(blocks) - self.k :]:
            block.requires_grad_(True)
        names = [name for name, _ in model.named_parameters()]
        above = max(index for index, name in enumerate(names) if name.startswith(f"{prefix}."))
        for name in names[above + 1 :]:
            model.get_parameter(name).requires_grad_(True)
        for parameter in model.get_input_embeddings().parameters():
            parameter.requires_grad_(False)  # an output layer tied to it stays as it is, too
        for name in loaded.head_names:
            for path, parameter in model.named_parameters():
                if name in path.split("."):
                    parameter.requires_grad_(True)
