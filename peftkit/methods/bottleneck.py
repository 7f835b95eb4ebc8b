"""Bottleneck adapters: two small layers with a nonlinearity between them, on the residual branches of every block.

Houlsby et al. 2019, arXiv:1902.00751 (after attention and after feed-forward). Pfeiffer et al. 2020, arXiv:2005.00247
(after feed-forward only). He et al. 2021, arXiv:2110.04366 (parallel to feed-forward, scaled by 4). The branches are
found by tracing a forward pass of a few tokens (``methods.layers.residual``), which works for any architecture. In
post-norm models Pfeiffer's adapter reads the feed-forward branch before the norm, as in pre-norm ones.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from peftkit.errors import MethodError, ModelError
from peftkit.methods.targets import Fraction, Layers, choose_blocks
from peftkit.schema.head import possible_heads
from peftkit.schema.method import Method
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel, in_head

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from peftkit.methods.layers.bottleneck_adapter import AdapterShape
    from peftkit.schema.recipe import Recipe

PARALLEL_SCALE = 4.0  # He et al.'s scaling of parallel adapters; sequential ones are not scaled


@METHODS.register("bottleneck")
class Bottleneck(Method):
    """Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020; He et al. 2021)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1902.00751"
    merges: ClassVar[bool] = False
    loads_with: ClassVar[Literal["peft", "transformers", "peftkit"]] = "peftkit"
    learns_pooling: ClassVar[bool] = False

    kind: Literal["bottleneck"] = "bottleneck"
    variant: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """houlsby: after attention and after feed-forward; pfeiffer: after feed-forward; parallel: parallel to it."""
    reduction_factor: Annotated[float, Field(ge=1)] = 16
    """Width of the model ÷ width of the bottleneck."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Width of the bottleneck; replaces reduction_factor."""
    nonlinearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Nonlinearity between the two layers."""
    dropout: Fraction = 0.0
    """Dropout between the two layers."""
    scaling: Annotated[float, Field(gt=0)] | Literal["learned"] | None = None
    """Factor on the adapter's output; learned: a trained scalar; None takes 1, and 4 for parallel."""
    init: Literal["zero", "normal"] = "zero"
    """zero: the second layer starts at 0, so training starts from the base's outputs; normal: both near 0 (Houlsby)."""
    layers: Layers = None
    """Blocks that get adapters: their numbers from 0, or -2 for the last two; None for all. auto: as many of the last
    ones as the training rows are estimated to need; {auto: {tolerance: 0.05, at_least: 1, rows: 512}} says how much may
    be lost."""

    def check(self, recipe: Recipe) -> None:
        """Raises MethodError for an encoder–decoder: its branches are looked for in one stack of blocks."""
        super().check(recipe)
        if any(head.encodes_source for head in possible_heads(recipe.task)):
            raise MethodError(
                f"method.kind={self.kind} adapts one stack of blocks, and task.kind={recipe.task.kind} has an encoder "
                "and a decoder; use method.kind=lora or ia3"
            )

    def unmergeable_reason(self) -> str | None:
        """Its adapters are nonlinear."""
        return "method 'bottleneck' cannot be merged: its adapters are nonlinear, so no weights of the base equal them"

    def apply(self, loaded: LoadedModel) -> None:
        """Inserts the adapters; raises MethodError where a block has no such branch."""
        from peftkit.methods.layers import bottleneck_adapter

        model = loaded.model
        model.requires_grad_(False)
        bottleneck_adapter.insert(model, self.adapter_shapes(model), self.init)
        for name, parameter in model.named_parameters():
            if in_head(name, loaded.head_names):
                parameter.requires_grad_(True)

    def load_adapter(self, loaded: LoadedModel, folder: Path) -> None:
        """Loads the adapters and the head of an earlier run."""
        from peftkit.methods import continuing
        from peftkit.methods.layers import bottleneck_adapter

        shapes = [asdict(adapter.shape) for adapter in bottleneck_adapter.adapters(loaded.model)]
        continuing.load_native(self, loaded, folder, shapes)

    def adapter_shapes(self, model: nn.Module) -> list[AdapterShape]:
        """The shapes of the adapters; raises MethodError where a block has no such branch."""
        from peftkit.methods.layers.bottleneck_adapter import AdapterShape
        from peftkit.methods.layers.residual import find_branches

        try:
            branches = find_branches(model)
        except ModelError as error:
            raise MethodError(f"method.kind=bottleneck: {error}") from error
        kinds = ("attention", "feed_forward") if self.variant == "houlsby" else ("feed_forward",)
        chosen, parallel = choose_blocks(model, self.layers), self.variant == "parallel"
        branches = [branch for branch in branches if branch.kind in kinds and branch.block in chosen]
        for kind in kinds:
            blocks = [branch.block for branch in branches if branch.kind == kind]
            if sorted(blocks) != sorted(chosen):
                raise MethodError(
                    f"method.variant={self.variant} needs one {kind} branch in every block of {type(model).__name__}; "
                    f"{len(set(blocks))} of {len(chosen)} blocks have one; use another variant, or method.kind=lora"
                )
        return [
            AdapterShape(
                branch=branch,
                size=self.size or max(1, round(branch.width / self.reduction_factor)),
                nonlinearity=self.nonlinearity,
                scaling=self.scaling or (PARALLEL_SCALE if parallel else 1.0),
                dropout=self.dropout,
                parallel=parallel,
            )
            for branch in branches
        ]
