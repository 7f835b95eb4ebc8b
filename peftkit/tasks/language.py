"""What every task on a language model shares: the loss over scored tokens, and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.errors import RecipeError
from peftkit.schema.task import Task
from peftkit.schema.types import Batch, TaskInfo

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig, EvaluationConfig

CAUSAL_LM = "causal_lm"


class LanguageTask(Task):
    """Learns to predict the scored tokens of each example: the loss is their cross-entropy, summed."""

    head: ClassVar[Literal["classification", "causal_lm"]] = "causal_lm"

    def loss(self, model: torch.nn.Module, batch: Batch, info: TaskInfo, pooling: str) -> torch.Tensor:
        """Cross-entropy summed over the scored tokens; ÷ Σ weight is the loss per token."""
        from peftkit.models.kernels import linear_cross_entropy

        return linear_cross_entropy.loss(model, batch)

    def outputs(self, model: torch.nn.Module, batch: Batch, info: TaskInfo, pooling: str) -> dict[str, torch.Tensor]:
        """``loss``, ``weight`` (scored tokens) and ``correct`` (those guessed right), each [rows] fp32."""
        from peftkit.models.kernels import linear_cross_entropy

        return linear_cross_entropy.row_outputs(model, batch)

    def metrics(
        self, outputs: Mapping[str, np.ndarray], info: TaskInfo, evaluation: EvaluationConfig
    ) -> dict[str, float]:
        """``loss`` per scored token, ``perplexity`` = exp(loss), ``token_accuracy``, and ``tokens`` scored."""
        tokens = float(outputs["weight"].sum(dtype="float64"))
        loss = float(outputs["loss"].sum(dtype="float64")) / max(tokens, 1.0)
        correct = float(outputs["correct"].sum(dtype="float64"))
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "token_accuracy": correct / max(tokens, 1.0),
            "tokens": tokens,
        }


def refuse_augmentation(data: DataConfig) -> None:
    """Raises RecipeError: changed words would be learned as the text to write."""
    if data.augmentation is not None:
        raise RecipeError(
            "data.augmentation changes words of the text, and a language model would learn to write them so; "
            "set data.augmentation=null"
        )


def check_window(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Raises RecipeError when ``data.max_length`` is longer than what the tokenizer says its model reads."""
    reads: Any = tokenizer.model_max_length
    if reads and data.max_length > reads:
        raise RecipeError(
            f"data.max_length is {data.max_length}, but this base model reads {reads} tokens; "
            f"set data.max_length={reads} or less"
        )
