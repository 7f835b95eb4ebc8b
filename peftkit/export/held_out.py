"""A loaded model scored on held-out rows of a run's own data, while an export is computed from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peftkit.data.batching import pass_tokens
from peftkit.data.pipeline import encode_rows, prepare
from peftkit.evaluation import runner
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import LoadedModel, TaskInfo
from peftkit.training.step import TaskModule


class HeldOutRows:
    """The first rows of a run's test split, or validation where there is none, split as in training."""

    def __init__(self, recipe: Recipe, info: TaskInfo, rows: int) -> None:
        splits = prepare(recipe).splits
        self.split = next(name for name in ("test", "validation", "train") if name in splits)
        self._rows = list(splits[self.split].select(np.arange(min(rows, len(splits[self.split])))))
        self._recipe, self._info = recipe, info

    def __len__(self) -> int:
        return len(self._rows)

    @torch.no_grad()
    def score(self, loaded: LoadedModel) -> dict[str, float]:
        """The task's metrics of a model in fp32 on the CPU."""
        head = head_of(self._info, self._recipe.task)
        split = encode_rows(self._rows, loaded.tokenizer, self._recipe, self._info)
        module = TaskModule(loaded, head).eval()
        outputs = runner.predict(
            module, split, loaded.tokenizer, device=torch.device("cpu"), batch_size=self._recipe.evaluation.batch_size,
            tokens=pass_tokens(self._recipe.training, "cpu"), unpadded=module.unpadded,
        )  # fmt: skip
        values: dict[str, Any] = head.metrics(outputs, self._recipe.evaluation)
        return {name: float(value) for name, value in values.items()}


def listed(metrics: dict[str, float], names: tuple[str, ...]) -> str:
    """The named metrics of a split, as in "accuracy 0.91, f1 0.9"."""
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
