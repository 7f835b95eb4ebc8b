"""The contract of a method: what is trained on top of, or inside, the base model.

A method is both the schema of ``method`` in a recipe and its behaviour. It imports torch, peft and transformers only
inside the functions that need them, so that every schema loads in a tenth of a second.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.errors import MethodError
from peftkit.schema.head import possible_heads
from peftkit.schema.sections import ConfigSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from peftkit.schema.recipe import Recipe
    from peftkit.schema.types import Batch, LoadedModel


class Method(ConfigSection):
    """What is trained on top of, or inside, the base model."""

    paper: ClassVar[str] = ""
    default_learning_rate: ClassVar[float] = 1e-3
    saves: ClassVar[Literal["adapter", "model"]] = "adapter"
    """Whether a run exports peft's adapter format or a whole transformers model."""
    loads_with: ClassVar[Literal["peft", "transformers", "peftkit"]] = "peft"
    """The library that puts an exported adapter on its base: peftkit for layers that peft lacks."""
    adapts_backbone: ClassVar[bool] = True
    """Whether anything below the head is trained."""
    learns_pooling: ClassVar[bool] = True
    """Whether it trains enough below the head to make up for a pooler that the base never used."""
    keeps_token_ids: ClassVar[bool] = True
    """Whether the base still reads token ids, by which a decoder that pools finds the last token of a row."""
    quantizations: ClassVar[tuple[str, ...] | None] = None
    """Kinds of quantization that its layers can stand on; None for all."""
    packed: ClassVar[tuple[str, ...] | None] = None
    """Kinds of checkpoints with quantized weights that its layers can stand on; None for all."""
    merges: ClassVar[bool] = True
    """Whether the result can be folded into the base's own weights, so that nothing of the method is left."""
    checkpoints_activations: ClassVar[bool] = True
    """Whether it works with ``training.gradient_checkpointing``."""
    starts_as_base: ClassVar[bool] = True
    """Whether the untrained method leaves the base's outputs as they were."""

    kind: str

    def check(self, recipe: Recipe) -> None:
        """Raises MethodError when the method cannot work in this recipe; called before anything is loaded."""
        if not self.adapts_backbone and not all(head.adds_layers for head in possible_heads(recipe.task)):
            raise MethodError(
                f"method.kind={self.kind} trains a classifier's head, and task.kind={recipe.task.kind} has none; "
                "use method.kind=lora"
            )
        quantization = recipe.quantization.kind if recipe.quantization is not None else None
        if quantization and self.quantizations is not None and quantization not in self.quantizations:
            known = ", ".join(["null", *self.quantizations])
            raise MethodError(
                f"method.kind={self.kind} cannot train over weights with quantization.kind={quantization}; "
                f"it works with quantization={known}"
            )
        if recipe.training.gradient_checkpointing != "off" and not self.checkpoints_activations:
            raise MethodError(
                f"method.kind={self.kind} puts keys and values before every layer's own, which checkpointed layers "
                "drop; set training.gradient_checkpointing=off"
            )
        if recipe.export.merge and (reason := self.unmergeable_reason()):
            raise MethodError(f"export.merge: {reason}; set export.merge=false")

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Raises MethodError when the base's architecture cannot take it; called before any weight is loaded."""

    def unmergeable_reason(self) -> str | None:
        """Why the trained result cannot be merged into the base; None where it can."""
        return None if self.merges else f"method '{self.kind}' changes no weight that it could be merged into"

    def unsupported_checkpoint_reason(self, kind: str) -> str | None:
        """Why it is not trained over a checkpoint whose weights are quantized with a kind already; None where it is."""
        if self.saves == "model":
            return f"method.kind={self.kind} trains the base's own weights; use method.kind=lora"
        if self.packed is None or kind in self.packed:
            return None
        known = f"takes checkpoints of {', '.join(self.packed)}" if self.packed else "needs whole weights"
        return f"method.kind={self.kind} {known}; use method.kind=lora, or the unquantized model"

    @abstractmethod
    def apply(self, loaded: LoadedModel) -> None:
        """Replaces ``loaded.model`` by the trainable model: new modules in place, ``requires_grad`` set everywhere.

        Raises MethodError when, for instance, a pattern matches no module.
        """

    def initialize(self, loaded: LoadedModel, batches: Sequence[Batch]) -> None:
        """Called once after ``apply``, before the optimizer is made, on every process alike, and again on resume.

        Args:
            batches: a few batches of training rows on the model's device; each is formed when it is asked for.
        """

    def begin(self, model: Any, total: int) -> None:
        """Tells how many optimizer steps the whole run will have; called before the first step, and on resume."""

    def penalty(self, model: Any) -> torch.Tensor | None:
        """A scalar added once to every optimizer step's mean loss, with its gradient; None for none."""
        return None

    def after_step(self, model: Any, step: int) -> None:
        """Called when the optimizer has done its step number ``step`` (from 1); the gradients are still there."""

    def finish(self, model: Any) -> None:
        """Called once when the weights that are kept are in place, before they are scored and exported."""

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        """What besides trained parameters and optimizer must be in a checkpoint, so that a resumed run is exact."""
        return {}

    def load_state(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what ``state`` gave, when a checkpoint's parameters are put back."""

    def learning_rate_factor(self, name: str) -> float:
        """What the learning rate of the parameter of that name is multiplied by."""
        return 1.0

    def decays(self, name: str, parameter: torch.Tensor) -> bool:
        """Whether weight decay applies to a parameter: to matrices, not to biases and normalization weights."""
        return parameter.ndim >= 2
