"""What the export is given at the end of a run, without the training: a changed model and held-out rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from peftkit.export.adapter import export_run
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.types import TaskInfo
from tests import tiny

INFO = TaskInfo("single_label_classification", ("cat", "dog", "eel"))
TEXTS = [" ".join(tiny.WORDS[start : start + 2 + start % 9]) for start in range(0, 60, 3)]


def trained(folder: Path, info: TaskInfo = INFO, **parts: Any) -> SimpleNamespace:
    """A model built from a recipe on ``folder``, its trainable weights moved as training would."""
    recipe = tiny.tiny_recipe(folder, **parts)
    tokenizer = load_tokenizer(recipe.model)
    loaded = build(recipe, info, tokenizer)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    lengths = np.array([len(row) for row in ids], dtype=np.int32)
    split = SimpleNamespace(examples=Dataset.from_dict({"input_ids": ids}), lengths=lengths)
    return SimpleNamespace(
        loaded=loaded, recipe=recipe, prepared=SimpleNamespace(info=info), tokenizer=tokenizer,
        encoded=SimpleNamespace(splits={"test": split}), metrics={"test": {"accuracy": 0.75, "loss": 0.5}},
    )  # fmt: skip


def export(run: Path, made: SimpleNamespace) -> Path:
    """Exports what ``trained`` gave into a run's folder."""
    return export_run(run, made.loaded, made.recipe, made.prepared, made.encoded, made.metrics)


def exported(run: Path, folder: Path, info: TaskInfo = INFO, **parts: Any) -> tuple[Path, SimpleNamespace]:
    """The exported folder, and what was trained."""
    made = trained(folder, info, **parts)
    return export(run, made), made
