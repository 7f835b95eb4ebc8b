"""The contract of a method: what is trained on top of, or inside, the base model.

A method is both the schema of ``method`` in a recipe and its behaviour. It imports torch, peft and transformers only
inside the functions that need them, so that every schema loads in a tenth of a second.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from peftkit.errors import MethodError
from peftkit.schema.automatic import Automatic
from peftkit.schema.head import possible_heads
from peftkit.schema.sections import ConfigSection

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedConfig

    from peftkit.schema.recipe import Recipe
    from peftkit.schema.types import Batch, LoadedModel


RENAMED = {
    "begin": "on_train_begin", "after_step": "on_step_end", "finish": "on_train_end", "packed": "quantized_checkpoints",
    "why_not_merged": "unmergeable_reason", "why_not_over": "unsupported_checkpoint_reason",
}  # fmt: skip


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
    """Whether it trains enough of the backbone to make up for a pooler that the base never used."""
    keeps_token_ids: ClassVar[bool] = True
    """Whether the base still reads token ids, by which a decoder that pools finds the last token of a row."""
    quantizations: ClassVar[tuple[str, ...] | None] = None
    """Kinds of quantization that it can train over; None for all."""
    quantized_checkpoints: ClassVar[tuple[str, ...] | None] = None
    """Kinds of checkpoints with quantized weights that it can train over; None for all."""
    merges: ClassVar[bool] = True
    """Whether the result can be merged into the base's own weights."""
    checkpoints_activations: ClassVar[bool] = True
    """Whether it works with ``training.gradient_checkpointing``."""
    continues: ClassVar[bool] = True
    """Whether ``load_adapter`` can start it from an adapter that was trained before."""
    starts_as_base: ClassVar[bool] = True
    """Whether the untrained method leaves the base's outputs as they were."""

    kind: str

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuses members by the names of 0.1.0, which nothing would call."""
        super().__init_subclass__(**options)
        for old, new in RENAMED.items():
            if old in cls.__dict__:
                raise TypeError(f"{cls.__module__}.{cls.__name__}.{old}: peftkit calls this '{new}' now; rename it")

    def automatic(self) -> dict[str, Automatic]:
        """Its fields that the run chooses on its training rows, in the order in which they are chosen."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if isinstance(value, Automatic)}

    def widest(self) -> Self:
        """The method with the most that may be chosen for each automatic field: what is planned."""
        return self.model_copy(update={name: value.widest for name, value in self.automatic().items()})

    def probed(self) -> Self:
        """The method whose gradients automatic fields are chosen by; it need not be one that is trained."""
        return self.model_copy(update={name: value.probed for name, value in self.automatic().items()})

    def check(self, recipe: Recipe) -> None:
        """Raises MethodError when the method cannot work with this recipe; called before anything is loaded."""
        for name, value in self.automatic().items():
            if recipe.model.continues:
                raise MethodError(
                    f"method.{name}=auto is chosen for a new adapter, and model.adapter_use=continue starts from a "
                    f"trained one; set method.{name} to that adapter's"
                )
            value.check(name, recipe)
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
                f"method.kind={self.kind} puts keys and values before every layer's own, which activation "
                "checkpointing drops; set training.gradient_checkpointing=off"
            )
        if recipe.model.offload is not None and self.saves == "model":
            raise MethodError(
                f"method.kind={self.kind} trains the base's own weights and saves all of them, and model.offload is "
                "for frozen ones; use method.kind=lora, or set model.offload=null"
            )
        if recipe.model.continues and (not self.continues or self.saves == "model"):
            raise MethodError(
                f"method.kind={self.kind} cannot train an existing adapter further; set model.adapter_use=merge"
            )
        if recipe.export.merge and (reason := self.unmergeable_reason()):
            raise MethodError(f"export.merge: {reason}; set export.merge=false")

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Raises MethodError when the base's architecture cannot take it; called before any weight is loaded."""

    def unmergeable_reason(self) -> str | None:
        """Why the trained result cannot be merged into the base; None where it can."""
        return None if self.merges else f"method '{self.kind}' changes no weight that it could be merged into"

    def unsupported_checkpoint_reason(self, kind: str) -> str | None:
        """Why it cannot train over a checkpoint whose weights are already quantized with a kind; None where it can."""
        if self.saves == "model":
            return f"method.kind={self.kind} trains the base's own weights; use method.kind=lora"
        known = self.quantized_checkpoints
        if known is None or kind in known:
            return None
        needs = f"supports checkpoints quantized with {', '.join(known)}" if known else "needs unquantized weights"
        return f"method.kind={self.kind} {needs}; use method.kind=lora, or the unquantized model"

    @abstractmethod
    def apply(self, loaded: LoadedModel) -> None:
        """Replaces ``loaded.model`` by the trainable model: new modules in place, ``requires_grad`` set everywhere.

        Raises MethodError when, for instance, a pattern matches no module.
        """

    def load_adapter(self, loaded: LoadedModel, folder: Path) -> None:
        """Loads the weights of an adapter that the same method trained; called after ``apply``.

        On the meta device, it only checks that they fit.

        Raises:
            MethodError: the adapter is of another kind, size or place; the message names the fields to set.
        """
        raise NotImplementedError(f"{type(self).__name__} does not continue an adapter")

    def initialize(self, loaded: LoadedModel, batches: Sequence[Batch]) -> None:
        """Called once after ``apply``, before the optimizer exists, on every process, and again on resume.

        Args:
            batches: a few batches of training rows on the model's device, collated lazily.
        """

    def on_train_begin(self, model: Any, total_steps: int) -> None:
        """Called before the first step, and on resume, with the number of optimizer steps of the whole run."""

    def penalty(self, model: Any) -> torch.Tensor | None:
        """A scalar added once per optimizer step to the mean loss, with its gradient; None for none."""
        return None

    def on_step_end(self, model: Any, step: int) -> None:
        """Called after the optimizer's step number ``step`` (from 1), while the gradients still exist."""

    def on_train_end(self, model: Any) -> None:
        """Called once when the final weights are in place, before they are scored and exported."""

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        """What a checkpoint needs besides trained parameters and optimizer, so that a resumed run is exact."""
        return {}

    def load_state(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restores what ``state`` returned, after a checkpoint's parameters are restored."""

    def learning_rate_factor(self, name: str) -> float:
        """Factor on the learning rate of the parameter of that name."""
        return 1.0

    def decays(self, name: str, parameter: torch.Tensor) -> bool:
        """Whether weight decay applies to a parameter: to matrices, not to biases and normalization weights."""
        return parameter.ndim >= 2
