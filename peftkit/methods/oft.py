"""OFT: weights turned by trained orthogonal blocks, which keeps the angles between neurons.

R W with R block-diagonal, R = (I + S)(I − S)⁻¹ of skew-symmetric S. Qiu et al. 2023, arXiv:2306.07280; applied to the
layer's input, so that quantized weights stay untouched: Qiu et al. 2025, arXiv:2506.19847.

    method: {kind: oft, block_size: 32}
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.methods.targets import LinearLayerMethod
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel


@METHODS.register("oft")
class Oft(LinearLayerMethod):
    """Orthogonal finetuning (Qiu et al. 2023, arXiv:2306.07280)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.07280"
    default_learning_rate: ClassVar[float] = 1e-3
    quantizations: ClassVar[tuple[str, ...] | None] = ("nf4", "int8")
    packed: ClassVar[tuple[str, ...] | None] = ("awq", "bitsandbytes", "gptq", "hqq")

    kind: Literal["oft"] = "oft"
    block_size: Annotated[int, Field(ge=2)] = 32
    """Width of a block; where it does not divide a layer's inputs, the nearest size that does is taken."""
    block_share: bool = False
    """One block for the whole layer."""
    constrained: bool = False
    """Keep S within a small ball (COFT)."""
    eps: Annotated[float, Field(gt=0)] = 6e-5
    """Radius of that ball."""
    neumann_terms: Annotated[int, Field(ge=0)] = 5
    """Terms of the series that stands for the inverse; 0 inverts exactly, which is slower."""

    def config(self, loaded: LoadedModel) -> Any:
        """peft's OFTConfig."""
        from peft import OFTConfig

        return OFTConfig(
            **self.shared(loaded),
            r=0,
            oft_block_size=self.block_size,
            block_share=self.block_share,
            coft=self.constrained,
            eps=self.eps,
            use_cayley_neumann=self.neumann_terms > 0,
            num_cayley_neumann_terms=self.neumann_terms or 5,
        )
