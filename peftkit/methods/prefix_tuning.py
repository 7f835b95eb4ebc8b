"""Prefix tuning: trained keys and values before those of every layer. Li & Liang 2021, arXiv:2101.00190.

method: {kind: prefix_tuning, virtual_tokens: 20}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.methods.prompt_methods import LearnedPrompt, check_keys_and_values, check_room
from peftkit.methods.targets import task_type
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from peftkit.schema.recipe import Recipe


@METHODS.register("prefix_tuning")
class PrefixTuning(LearnedPrompt):
    """A learned prompt of keys and values (Li & Liang 2021, arXiv:2101.00190)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2101.00190"
    default_learning_rate: ClassVar[float] = 1e-2
    checkpoints_activations: ClassVar[bool] = False
    keeps_token_ids: ClassVar[bool] = True

    kind: Literal["prefix_tuning"] = "prefix_tuning"
    projection: bool = False
    """Train a small network that makes the keys and values, which steadies training; only its output is saved."""
    projection_size: Annotated[int, Field(ge=1)] = 128
    """Width of that network."""
    init: Literal["random", "zero"] = "random"
    """Start of keys and values: standard normal numbers, as in the paper, or zeros, which change the base least."""

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """The architecture must take keys and values from outside, and have positions for them."""
        check_keys_and_values(self.kind, config)
        check_room(self.kind, self.virtual_tokens, config, recipe)

    def config(self, loaded: LoadedModel) -> Any:
        """peft's PrefixTuningConfig."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type=task_type(loaded),
            num_virtual_tokens=self.virtual_tokens,
            prefix_projection=self.projection,
            encoder_hidden_size=self.projection_size,
            init_weights="zero" if self.init == "zero" else None,
            modules_to_save=list(loaded.head_names) or None,
        )
