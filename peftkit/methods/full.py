"""Full finetuning, of every weight or of the last k blocks: the base's own weights are trained.

The reference that other methods are compared with. The export is a complete model.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from peftkit.errors import MethodError
from peftkit.schema.method import Method
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel, in_head


@METHODS.register("full")
class Full(Method):
    """Every weight (Devlin et al. 2018, arXiv:1810.04805)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1810.04805"
    default_learning_rate: ClassVar[float] = 5e-5
    saves: ClassVar[Literal["adapter", "model"]] = "model"
    quantizations: ClassVar[tuple[str, ...] | None] = ()

    kind: Literal["full"] = "full"

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
    quantizations: ClassVar[tuple[str, ...] | None] = ()

    kind: Literal["top_k"] = "top_k"
    k: Annotated[int, Field(ge=1)] = 2
    """Number of trained blocks, counted from the top."""

    def apply(self, loaded: LoadedModel) -> None:
        """Sets ``requires_grad`` on the last k blocks and everything after them except tied output embeddings."""
        from peftkit.models.blocks import find_blocks

        model = loaded.model
        prefix, blocks = find_blocks(model)
        if self.k > len(blocks):
            raise MethodError(
                f"method.k={self.k}: the model has {len(blocks)} blocks; lower method.k, or use method.kind=full"
            )
        first = f"{prefix}.{len(blocks) - self.k}."
        embeddings = set(model.get_input_embeddings().parameters())  # an output layer may be tied to them
        reached = False
        for name, parameter in model.named_parameters():
            reached = reached or name.startswith(first)
            parameter.requires_grad_((reached and parameter not in embeddings) or in_head(name, loaded.head_names))
