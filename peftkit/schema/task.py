"""The contract of a task: what is learned from a row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.schema.sections import ConfigSection
from peftkit.schema.types import Batch, LoadedModel, Row, TaskInfo

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig, EvaluationConfig


class Task(ConfigSection):
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
