"""Bottleneck adapters: two small layers with a nonlinearity between them, on the branches of every block.

Houlsby et al. 2019, arXiv:1902.00751 (after attention and after feed-forward). Pfeiffer et al. 2020, arXiv:2005.00247
(after feed-forward only). He et al. 2021, arXiv:2110.04366 (beside feed-forward, scaled by 4).

    method: {kind: bottleneck, variant: pfeiffer, reduction_factor: 16}

Where a branch ends is seen in a forward pass of a few tokens (``methods.layers.residual``), so that any architecture
takes them. In post-norm models Pfeiffer's adapter reads the feed-forward branch before the norm, as in pre-norm ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.errors import MethodError, ModelError
from peftkit.schema.method import Method
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from torch import nn

KINDS = {"houlsby": ("attention", "feed_forward"), "pfeiffer": ("feed_forward",), "parallel": ("feed_forward",)}
SCALES = {"houlsby": 1.0, "pfeiffer": 1.0, "parallel": 4.0}


@METHODS.register("bottleneck")
class Bottleneck(Method):
    """Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020; He et al. 2021)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1902.00751"
    default_learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = False
    loads_with: ClassVar[Literal["peft", "transformers", "peftkit"]] = "peftkit"
    learns_pooling: ClassVar[bool] = False

    kind: Literal["bottleneck"] = "bottleneck"
    variant: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """houlsby: after attention and after feed-forward; pfeiffer: after feed-forward; parallel: beside feed-forward."""
    reduction_factor: Annotated[float, Field(ge=1)] = 16
    """Width of the model ÷ width of the bottleneck."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Width of the bottleneck, in place of reduction_factor."""
    nonlinearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Between the two layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout between the two layers."""
    scaling: Annotated[float, Field(gt=0)] | Literal["learned"] | None = None
    """What the adapter's output is multiplied by; learned: a trained number; None takes 1, and 4 for parallel."""
    init: Literal["zero", "normal"] = "zero"
    """zero: the second layer starts at 0, so that the model starts as the base; normal: both start near 0 (Houlsby)."""
    layers: int | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Blocks that get adapters: their numbers from 0, or -2 for the last two; None for all."""

    def unmergeable_reason(self) -> str | None:
        """A nonlinearity stands between the two layers."""
        return (
            "method 'bottleneck' cannot be merged: its adapters are not linear, so that no weights of the base could "
            "do the same"
        )

    def apply(self, loaded: LoadedModel) -> None:
        """Puts the adapters in place; raises MethodError where the blocks show no such branch."""
        from peftkit.methods.layers import bottleneck

        model = loaded.model
        model.requires_grad_(False)
        bottleneck.insert(model, self.shapes(model), self.init)
        for adapter in bottleneck.adapters(model):
            adapter.requires_grad_(True)
        for name, parameter in model.named_parameters():
            if set(name.split(".")) & set(loaded.head_names):
                parameter.requires_grad_(True)

    def shapes(self, model: nn.Module) -> list[Any]:
        """The adapters that belong into a model, as ``peftkit.methods.layers.bottleneck.AdapterShape``."""
        from peftkit.methods.layers.bottleneck import AdapterShape
        from peftkit.methods.layers.residual import find_branches

        try:
            branches = find_branches(model)
        except ModelError as error:
            raise MethodError(f"method.kind=bottleneck: {error}") from error
        kinds, chosen = KINDS[self.variant], self._blocks(model)
        found = [one for one in branches if one.kind in kinds and one.block in chosen]
        for kind in kinds:
            blocks = [one.block for one in found if one.kind == kind]
            if sorted(blocks) != sorted(chosen):
                raise MethodError(
                    f"method.variant={self.variant} needs one {kind} branch in every block of {type(model).__name__}, "
                    f"and {len(set(blocks))} of {len(chosen)} show one; try another variant, or method.kind=lora"
                )
        return [
            AdapterShape(
                branch=branch,
                size=self.size or max(1, round(branch.width / self.reduction_factor)),
                nonlinearity=self.nonlinearity,
                scaling=self.scaling or SCALES[self.variant],
                dropout=self.dropout,
                parallel=self.variant == "parallel",
            )
            for branch in found
        ]

    def _blocks(self, model: nn.Module) -> list[str]:
        """Names of the blocks that ``layers`` chooses."""
        from peftkit.models.blocks import find_blocks

        prefix, blocks = find_blocks(model)
        count = len(blocks)
        wanted: tuple[int, ...] = self.layers if isinstance(self.layers, tuple) else tuple(range(count))
        if isinstance(self.layers, int):
            wanted = tuple(range(count + self.layers, count)) if self.layers < 0 else (self.layers,)
        if not wanted or any(not 0 <= number < count for number in wanted):
            raise MethodError(f"method.layers={self.layers}: the model has {count} blocks, numbered 0 to {count - 1}")
        return [f"{prefix}.{number}" for number in dict.fromkeys(wanted)]
