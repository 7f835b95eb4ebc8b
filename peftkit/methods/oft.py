"""Orthogonal finetuning: weights rotated by trained orthogonal blocks, which preserves the angles between neurons.

OFT: R W with R block-diagonal, R = (I + S)(I − S)⁻¹ of skew-symmetric S. Qiu et al. 2023, arXiv:2306.07280; applied to
the layer's input, so that quantized weights stay untouched: Qiu et al. 2025, arXiv:2506.19847.
BOFT: R is a product of butterfly factors. Liu et al. 2023, arXiv:2311.06243.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.errors import MethodError
from peftkit.methods.peft_method import LinearLayerMethod
from peftkit.methods.targets import Fraction
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel


@METHODS.register("oft")
class Oft(LinearLayerMethod):
    """Orthogonal finetuning (Qiu et al. 2023, arXiv:2306.07280)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.07280"
    quantized_checkpoints: ClassVar[tuple[str, ...] | None] = ("awq", "bitsandbytes", "gptq", "hqq")

    kind: Literal["oft"] = "oft"
    block_size: Annotated[int, Field(ge=2)] = 32
    """Width of a block; where it does not divide a layer's input width, the nearest width that does is used."""
    block_share: bool = False
    """Share one block across the layer."""
    constrained: bool = False
    """Constrain S to a small ball (COFT)."""
    eps: Annotated[float, Field(gt=0)] = 6e-5
    """Radius of that ball."""
    neumann_terms: Annotated[int, Field(ge=0)] = 5
    """Terms of the Neumann series that approximates the inverse; 0 inverts exactly, which is slower."""

    def peft_config(self, loaded: LoadedModel) -> Any:
        from peft import OFTConfig

        return OFTConfig(
            **self.shared_arguments(loaded),
            r=0,
            oft_block_size=self.block_size,
            block_share=self.block_share,
            coft=self.constrained,
            eps=self.eps,
            use_cayley_neumann=self.neumann_terms > 0,
            num_cayley_neumann_terms=self.neumann_terms or 5,
        )


@METHODS.register("boft")
class Boft(LinearLayerMethod):
    """Butterfly orthogonal finetuning (Liu et al. 2023, arXiv:2311.06243)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2311.06243"

    kind: Literal["boft"] = "boft"
    block_size: Annotated[int, Field(ge=2)] = 4
    """Width of a block; it must divide the input width of every target."""
    butterfly_factor: Annotated[int, Field(ge=1)] = 1
    """Number of butterfly factors; 1 is plain block-diagonal, more need peft's CUDA extension."""
    dropout: Fraction = 0.0
    """Fraction of blocks dropped in a training step."""

    def peft_config(self, loaded: LoadedModel) -> Any:
        """peft's BOFTConfig; raises MethodError where peft would silently use a single factor."""
        import torch
        from peft import BOFTConfig

        if self.butterfly_factor > 1 and not torch.cuda.is_available():
            raise MethodError(
                f"method.butterfly_factor={self.butterfly_factor} needs peft's CUDA extension, and there is no CUDA "
                "device; set method.butterfly_factor=1"
            )
        return BOFTConfig(
            **self.shared_arguments(loaded),
            boft_block_size=self.block_size,
            boft_n_butterfly_factor=self.butterfly_factor,
            boft_dropout=self.dropout,
        )

    def decays(self, name: str, parameter: Any) -> bool:
        """No decay for the output scales, which start at 1."""
        return super().decays(name, parameter) and ".boft_s." not in name
