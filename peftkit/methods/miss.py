"""MiSS: one trained matrix shared by the shards of a layer's input. Kang & Yin 2024, arXiv:2409.15371."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.errors import MethodError
from peftkit.methods.peft_method import LinearLayerMethod
from peftkit.methods.targets import Fraction
from peftkit.schema.recipe import Recipe
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel


@METHODS.register("miss")
class Miss(LinearLayerMethod):
    """Matrix shard sharing (Kang & Yin 2024, arXiv:2409.15371)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2409.15371"
    default_learning_rate: ClassVar[float] = 5e-4

    kind: Literal["miss"] = "miss"
    rank: Annotated[int, Field(ge=1)] = 64
    """Rows of the shared matrix."""
    dropout: Fraction = 0.0
    """Dropout on the input of the update."""
    variant: Literal["balance", "bat", "mini"] = "balance"
    """balance: plain sum over shards; bat: the update also depends on the weight; mini: even fewer parameters."""
    mini_rank: Annotated[int, Field(ge=1)] = 1
    """Columns of the shared matrix in the mini variant; it must divide the output width of every target."""

    def check(self, recipe: Recipe) -> None:
        """The bat variant multiplies by the weight itself at every step."""
        super().check(recipe)
        if self.variant == "bat" and recipe.quantization is not None:
            raise MethodError(
                "method.variant=bat needs unquantized weights, and the recipe sets "
                f"quantization.kind={recipe.quantization.kind}; use method.variant=balance"
            )

    def peft_config(self, loaded: LoadedModel) -> Any:
        from peft import MissConfig

        return MissConfig(
            **self.shared_arguments(loaded),
            r=self.rank,
            miss_dropout=self.dropout,
            mini_r=self.mini_rank,
            init_weights=True if self.variant == "balance" else self.variant,
        )
