"""What the parts of a recipe have in common, and what a method, a task and a quantization must be able to do.

A part is a frozen pydantic model. Methods, tasks and quantizations are parts chosen by ``kind`` from a registry; the
class is both the schema and the behaviour, and imports torch, peft and transformers only inside the functions that
need them, so that every schema loads in a tenth of a second.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from peftkit.errors import MethodError, RecipeError, did_you_mean
from peftkit.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig, EvaluationConfig, ModelConfig, Recipe

Row = dict[str, Any]
Batch = dict[str, "torch.Tensor"]


class Part(BaseModel):
    """A frozen piece of a recipe that refuses unknown keys and names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_field", "unknown field '{key}': {hint}",
                        {"key": str(key), "hint": did_you_mean(str(key), cls.model_fields)},
                    )  # fmt: skip
        return value


@dataclass(frozen=True)
class ByKind:
    """Pydantic annotation: the mapping is validated by the class that its ``kind`` names in a registry."""

    registry: Registry[Any]

    def validate(self, value: Any) -> Any:
        if isinstance(value, Part):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or "kind" not in value:
            names = ", ".join(self.registry.names())
            raise ValueError(f"expected a mapping with 'kind', one of: {names}")
        try:
            part = self.registry.get(str(value["kind"]))
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return part.model_validate(dict(value))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(
            lambda part, info: part.model_dump(mode=info.mode), info_arg=True
        )
        return core_schema.no_info_plain_validator_function(self.validate, serialization=dump)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """One of the parts with its ``kind``, or the kind alone, which stands for the part with its defaults."""
        names = self.registry.names()
        parts = [handler(self.registry.get(name).__pydantic_core_schema__) for name in names]
        for part in parts:
            handler.resolve_ref_schema(part)["required"] = ["kind"]
        return {"oneOf": [*parts, {"type": "string", "enum": names}]} if names else {"type": "object"}


@dataclass(frozen=True)
class TaskInfo:
    """What a task learned about its data before training; stored in the run and needed to load the model again."""

    problem_type: str
    """single_label_classification, multi_label_classification, regression, or causal_lm."""
    labels: tuple[str, ...] = ()
    """Class names by id; empty for language models, one name for a regression."""
    class_weights: tuple[float, ...] | None = None
    """Loss weight of each class; None means 1 for all."""
    integers: Literal["names", "ids"] = "names"
    """What a whole number in the label column is: the name of a class ("5" stars), or its id, counted from 0."""


@dataclass
class LoadedModel:
    """A model with its head and tokenizer, on the way from the base model to the trainable one.

    ``model`` is always a transformers model, or peft's wrapper around one, so that everything that reads
    transformers and peft models reads ours.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    pooling: Literal["own", "mean", "cls"] = "own"
    """How a classifier turns tokens into one vector: the architecture's own way, or over per-token logits."""
    head_names: tuple[str, ...] = ()
    """Names of the modules on top of the backbone that a classifier trains in full; empty for language models."""
    fingerprint: str = ""
    """SHA-256 over config, weights' file digests or commit, and vocabulary of the base."""
    notes: list[str] = field(default_factory=list)
    """What was decided and why, in words for the user (dtype fallback, pad token, …)."""


class Method(Part):
    """What is trained on top of, or inside, the base model."""

    paper: ClassVar[str] = ""
    default_learning_rate: ClassVar[float] = 1e-3
    saves: ClassVar[Literal["adapter", "model"]] = "adapter"
    """Whether a run exports peft's adapter format or a whole transformers model."""
    adapts_backbone: ClassVar[bool] = True
    """Whether anything below the head is trained."""
    learns_pooling: ClassVar[bool] = True
    """Whether it trains enough below the head to make up for a pooler that the base never used."""
    heads: ClassVar[tuple[str, ...]] = ("classification", "causal_lm")
    """Tasks it is defined for, by their heads."""
    classifies_on_decoders: ClassVar[bool] = True
    """Whether a decoder's classifier, which reads the last of a row's tokens, can stand on it."""
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
        if recipe.task.head not in self.heads:
            raise MethodError(f"method.kind={self.kind} is not defined for task.kind={recipe.task.kind}")
        held = recipe.quantization.kind if recipe.quantization is not None else None
        if held and self.quantizations is not None and held not in self.quantizations:
            known = ", ".join(["null", *self.quantizations])
            raise MethodError(
                f"method.kind={self.kind} cannot stand on weights held by quantization.kind={held}; it works with "
                f"quantization={known}"
            )
        if recipe.training.gradient_checkpointing != "off" and not self.checkpoints_activations:
            raise MethodError(
                f"method.kind={self.kind} puts keys and values before every layer's own, which checkpointed layers "
                "drop; set training.gradient_checkpointing=off"
            )
        if recipe.export.merge and (reason := self.why_not_merged()):
            raise MethodError(f"export.merge: {reason}; set export.merge=false")

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Raises MethodError when the base's architecture cannot take it; called before any weight is loaded."""

    def why_not_merged(self) -> str | None:
        """Why the trained result cannot be merged into the base; None where it can."""
        return None if self.merges else f"method '{self.kind}' changes no weight that it could be merged into"

    def why_not_over(self, kind: str) -> str | None:
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


class Quantization(Part):
    """How the frozen weights are held."""

    kind: str

    @abstractmethod
    def load_arguments(self, model: ModelConfig, head_names: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments for transformers' ``from_pretrained``; heads and embeddings stay unquantized."""


class Task(Part):
    """What is learned from a row, and how it is scored.

    The data pipeline calls ``describe``, ``canonical`` and ``encode``; training calls ``loss``; evaluation calls
    ``outputs`` and ``metrics``. Canonical rows also carry ``_file`` and ``_line`` (1-based, of the source).
    """

    head: ClassVar[Literal["classification", "causal_lm"]]

    kind: str

    @abstractmethod
    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Reads what must be known of all rows first (label names, problem type) from raw splits.

        Raises DataError for a missing column, a wrong label type, or a single class.
        """

    @abstractmethod
    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """The source's row under the task's own column names and types; raises DataError(column=…) for a bad one."""

    @abstractmethod
    def text_of(self, row: Row) -> str:
        """The text of a canonical row by which duplicates are judged."""

    def with_text(self, row: Row, change: Any) -> Row:
        """The canonical row with ``change`` (str → str) applied to its learnable text (cleaning, augmentation)."""
        return {**row, "text": change(row["text"])}

    def stratum(self, row: Row) -> str:
        """The group whose share every split keeps; the empty string where there is none."""
        return ""

    @abstractmethod
    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """A batch of canonical rows as columns → columns ``input_ids`` and ``labels``, ``weight``, ``row``.

        ``weight`` is what the row adds to the loss's denominator (its scored tokens, or its class weight); ``row`` is
        its index within the batch of rows (an encoder may drop rows, or make several examples of one). Columns
        ``truncated`` (tokens cut off), and any further model inputs (``token_type_ids``, ``position_ids``) may follow.
        """

    def initialize(self, loaded: LoadedModel, batches: Sequence[Batch], info: TaskInfo) -> None:
        """Called once after the method's own ``initialize``, on every process alike, and again on resume."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch, info: TaskInfo, pooling: str) -> torch.Tensor:
        """The loss summed over the batch's scored examples or tokens (a scalar; the caller divides once)."""

    @abstractmethod
    def outputs(self, model: torch.nn.Module, batch: Batch, info: TaskInfo, pooling: str) -> dict[str, torch.Tensor]:
        """What evaluation needs of each row, first dimension = rows; always ``loss`` and ``weight`` [rows] fp32."""

    @abstractmethod
    def metrics(
        self, outputs: Mapping[str, np.ndarray], info: TaskInfo, evaluation: EvaluationConfig
    ) -> dict[str, float]:
        """Figures of a split from the gathered outputs; ``loss`` is always among them."""

    def best_metric(self, info: TaskInfo) -> str:
        """The validation figure by which the best checkpoint is chosen when the recipe names none."""
        return "loss"
