"""A finished run, loaded and ready for use.

model = peftkit.load("runs/bbc_news_lora-20260101-120000")
model.predict(["The striker scored twice."])[0].label
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftkit.errors import DataError, RunError
from peftkit.export.description import Description
from peftkit.export.loading import load_exported
from peftkit.models import policy
from peftkit.parts import LoadedModel, Row, TaskInfo
from peftkit.recipe import Recipe

BATCH_SIZE = 32
Text = str | tuple[str, str]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one text."""

    label: str | tuple[str, ...] | float
    """The likeliest label; of a multi-label task all that are over the threshold; of a regression the number."""
    probability: float | None
    """Of the label; of several labels the least of theirs (1 − the largest when none holds); None for a regression."""
    probabilities: dict[str, float]
    """Of every label; empty for a regression."""


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with everything needed to use it."""

    path: Path
    """The exported folder."""
    loaded: LoadedModel
    recipe: Recipe
    info: TaskInfo
    about: Description
    metrics: dict[str, Any]
    """Final figures by split."""

    @property
    def model(self) -> Any:
        """The transformers model, or peft's wrapper around it, in evaluation mode."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer it was trained with."""
        return self.loaded.tokenizer

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names by id."""
        return self.info.labels

    def predict(
        self, texts: Text | Sequence[Text], *, batch_size: int = BATCH_SIZE, threshold: float | None = None
    ) -> list[Prediction]:
        """Predictions in the order of the texts.

        Args:
            texts: texts, or (text, text pair) tuples; a single one is taken as a list of one.
            batch_size: texts in a forward pass; texts of like length go together.
            threshold: probability from which a label of a multi-label task holds; None takes the task's own.

        Raises:
            RunError: the run is a language model.
            DataError: something that is not a text.
        """
        logits = self.logits(texts, batch_size=batch_size)
        if threshold is None:
            threshold = float(getattr(self.recipe.task, "threshold", 0.5))
        return [_prediction(row, self.info, threshold) for row in logits]

    def logits(self, texts: Text | Sequence[Text], *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Scores [texts, labels] fp32 before softmax or sigmoid; see ``predict``."""
        from peftkit.data.pipeline import encode_rows
        from peftkit.evaluation import runner
        from peftkit.training.step import TaskModule

        if self.info.problem_type == "causal_lm":
            raise RunError(f"{self.path}: a language model has no labels to predict; use generate, or `peftkit chat`")
        rows = list(_rows(texts))
        if not rows:
            return np.zeros((0, len(self.info.labels)), dtype=np.float32)
        split = encode_rows(rows, self.tokenizer, self.recipe, self.info)
        device = next(self.model.parameters()).device
        dtype = policy.dtype_for(self.recipe.model, device)
        outputs = runner.predict(
            TaskModule(self.loaded, self.recipe.task, self.info), split, self.tokenizer, device=device,
            batch_size=batch_size, autocast=lambda: policy.autocast(dtype, device),
        )  # fmt: skip
        return outputs["logits"]


def load(path: str | Path, *, device: str | None = None) -> LoadedRun:
    """Loads a finished run, or an exported folder.

    Args:
        path: a run's folder, its ``adapter/`` or ``model/``, or a copy of that on another machine.
        device: "cpu", "cuda", "cuda:1", …; None takes CUDA where there is one.

    Raises:
        RunError: not a finished run of peftkit.
        ModelError: the base is missing or another than the one trained on, weights are pickled or damaged, or the
            head does not fit the labels.
    """
    exported = load_exported(path, device=device)
    file = exported.folder / "metrics.json"
    metrics = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return LoadedRun(exported.folder, exported.loaded, exported.recipe, exported.about.info, exported.about, metrics)


def _rows(texts: Text | Sequence[Text]) -> Iterator[Row]:
    """Canonical rows without labels; a lone (text, pair) tuple cannot be told from two texts, and is two texts."""
    given = [texts] if isinstance(texts, str) else list(texts)
    for place, text in enumerate(given):
        if place and isinstance(text, str) != isinstance(given[0], str):
            raise DataError(f"text {place}: texts and (text, text pair) tuples are mixed; give one kind in a call")
        if isinstance(text, str):
            yield {"text": text}
        elif isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text):
            yield {"text": text[0], "text_pair": text[1]}
        else:
            raise DataError(
                f"text {place}: expected a text or (text, text pair), found {type(text).__name__} {text!r:.60}"
            )


def _prediction(logits: np.ndarray, info: TaskInfo, threshold: float) -> Prediction:
    scores = torch.from_numpy(np.asarray(logits, dtype=np.float64))
    if info.problem_type == "regression":
        return Prediction(float(scores.reshape(-1)[0]), None, {})
    if info.problem_type == "multi_label_classification":
        each = scores.sigmoid().tolist()
        held = tuple(label for label, value in zip(info.labels, each) if value >= threshold)
        sure = min((value for value in each if value >= threshold), default=1 - max(each))
        return Prediction(held, sure, dict(zip(info.labels, each)))
    each = scores.softmax(-1).tolist()
    best = int(np.argmax(each))
    return Prediction(info.labels[best], each[best], dict(zip(info.labels, each)))
