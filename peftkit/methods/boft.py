"""BOFT: orthogonal finetuning with butterfly factors, sparse blocks whose product reaches far.

Liu et al. 2023, arXiv:2311.06243.

    method: {kind: boft, block_size: 4, butterfly_factor: 1}
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.errors import MethodError
from peftkit.methods.targets import LinearLayerMethod, Rate
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel


@METHODS.register("boft")
class Boft(LinearLayerMethod):
    """Butterfly orthogonal finetuning (Liu et al. 2023, arXiv:2311.06243)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2311.06243"
    default_learning_rate: ClassVar[float] = 1e-3
    quantizations: ClassVar[tuple[str, ...] | None] = ("nf4", "int8")

    kind: Literal["boft"] = "boft"
    block_size: Annotated[int, Field(ge=2)] = 4
    """Width of a block; it must divide the inputs of every target."""
    butterfly_factor: Annotated[int, Field(ge=1)] = 1
    """Butterfly factors multiplied; 1 is plain block-diagonal, more need peft's CUDA extension."""
    dropout: Rate = 0.0
    """Share of blocks left out in a training step."""

    def config(self, loaded: LoadedModel) -> Any:
        """peft's BOFTConfig; raises MethodError where peft would quietly take a single factor."""
        import torch
        from peft import BOFTConfig

        if self.butterfly_factor > 1 and not torch.cuda.is_available():
            raise MethodError(
                f"method.butterfly_factor={self.butterfly_factor} needs peft's CUDA extension, and there is no CUDA "
                "device; set method.butterfly_factor=1"
            )

        return BOFTConfig(
            **self.shared(loaded),
            boft_block_size=self.block_size,
            boft_n_butterfly_factor=self.butterfly_factor,
            boft_dropout=self.dropout,
        )

    def decays(self, name: str, parameter: Any) -> bool:
        """The scales of the outputs start at 1, which decay would pull down."""
        return super().decays(name, parameter) and ".boft_s." not in name
