"""Predictions of a file as entries of a log: what ``peftkit predict --monitor`` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.monitoring import features
from peftkit.monitoring.log import Entry, ServingLog

if TYPE_CHECKING:
    from peftkit.inference.trained_model import LoadedRun

ROUTE = "predict"


def recorder(folder: Path) -> Callable[[LoadedRun, list[Any], Sequence[Any], float], None]:
    """What appends texts and their predictions to a folder's log; raises DataError where that cannot be written."""
    log = ServingLog(folder)

    def record(model: LoadedRun, texts: list[Any], predictions: Sequence[Any], seconds: float) -> None:
        about = {"time": datetime.now(UTC), "model": model.recipe.name, "route": ROUTE, "seconds": seconds}
        entries = []
        for text, answer in zip(texts, predictions, strict=True):
            label, probability = answer.observed()
            values = features.of_text(features.parts(text), model.tokenizer)
            entries.append(Entry(**about, **values, label=label, probability=probability))
        log.append(entries)

    return record
