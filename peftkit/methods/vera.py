"""VeRA: W + Λ_b B Λ_d A, with one pair of frozen random A and B for all layers, and two trained vectors per layer."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.methods.peft_method import LinearLayerMethod
from peftkit.methods.targets import Fraction, fan_in_fan_out
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel


@METHODS.register("vera")
class Vera(LinearLayerMethod):
    """Trained vectors around shared random matrices (Kopiczko et al. 2023, arXiv:2310.11454)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2310.11454"
    default_learning_rate: ClassVar[float] = 1e-2
    learns_pooling: ClassVar[bool] = False

    kind: Literal["vera"] = "vera"
    rank: Annotated[int, Field(ge=1)] = 256
    """Rank of the random matrices."""
    d_initial: Annotated[float, Field(gt=0)] = 0.1
    """Initial value of the vector between the matrices."""
    dropout: Fraction = 0.0
    """Dropout on the input of the update."""
    projection_seed: int = 0
    """Seed of the random matrices."""
    save_projection: bool = True
    """Save the random matrices too: larger files, which load identically even if torch's random generator changes."""

    def peft_config(self, loaded: LoadedModel) -> Any:
        from peft import VeraConfig

        shared = self.shared_arguments(loaded)
        return VeraConfig(
            **shared,
            r=self.rank,
            d_initial=self.d_initial,
            vera_dropout=self.dropout,
            projection_prng_key=self.projection_seed,
            save_projection=self.save_projection,
            fan_in_fan_out=fan_in_fan_out(loaded.model, shared["target_modules"]),
        )
