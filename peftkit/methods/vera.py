"""VeRA: one pair of frozen random matrices for all layers, and two trained vectors a layer.

W + Λ_b B Λ_d A. Kopiczko et al. 2023, arXiv:2310.11454.

    method: {kind: vera, rank: 256}
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.methods.targets import LinearLayerMethod, Rate, transposed
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel


@METHODS.register("vera")
class Vera(LinearLayerMethod):
    """Trained vectors around shared random matrices (Kopiczko et al. 2023, arXiv:2310.11454)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2310.11454"
    default_learning_rate: ClassVar[float] = 1e-2
    learns_pooling: ClassVar[bool] = False
    quantizations: ClassVar[tuple[str, ...] | None] = ("nf4", "int8")

    kind: Literal["vera"] = "vera"
    rank: Annotated[int, Field(ge=1)] = 256
    """Width of the random matrices."""
    d_initial: Annotated[float, Field(gt=0)] = 0.1
    """Start of the vector between the matrices."""
    dropout: Rate = 0.0
    """Dropout on what enters the update."""
    projection_seed: int = 0
    """Seed of the random matrices."""
    save_projection: bool = True
    """Save the random matrices as well: larger files, which do not depend on a random generator staying as it is."""

    def config(self, loaded: LoadedModel) -> Any:
        """peft's VeraConfig."""
        from peft import VeraConfig

        shared = self.shared(loaded)
        return VeraConfig(
            **shared,
            r=self.rank,
            d_initial=self.d_initial,
            vera_dropout=self.dropout,
            projection_prng_key=self.projection_seed,
            save_projection=self.save_projection,
            fan_in_fan_out=transposed(loaded.model, shared["target_modules"]),
        )
