"""A finished run scored again: on a split of its own data, or on a file of rows with labels.

peftkit.evaluate("runs/bbc_news_lora-…")["accuracy"]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import RunError, did_you_mean
from peftkit.recipe import replace

if TYPE_CHECKING:
    from peftkit.export.in_memory import Merge
    from peftkit.inference import LoadedRun
    from peftkit.parts import Row


def evaluate(
    run: str | Path, *, split: str = "test", file: str | Path | None = None, merge: Merge = "auto"
) -> dict[str, float]:
    """Figures by name, as in the run's metrics.json.

    Args:
        run: a run's folder, or an exported one.
        split: train, validation or test of the run's own data, read, cleaned and split as for the training.
        file: rows with the recipe's columns, in place of a split; their labels must be the run's.
        merge: as for ``peftkit.load``; False scores base and adapter apart, as in training.

    Raises:
        RunError: not a finished run, no such split, or the data no longer have the run's labels.
        DataError: the file's rows are wrong.
    """
    from peftkit.evaluation.assessment import assess
    from peftkit.inference import load

    model = load(run, merge=merge)
    rows = _rows_of_file(model, Path(file)) if file else _rows_of_split(model, split)
    found = assess(model.recipe.task, _outputs(model, rows), rows, model.info, model.recipe.evaluation, split=split)
    return {name: figure["value"] for name, figure in found["metrics"].items()}


def _rows_of_split(model: LoadedRun, split: str) -> list[Row]:
    from peftkit.data.pipeline import prepare

    prepared = prepare(model.recipe)
    if prepared.info.labels != model.info.labels:
        now, then = (", ".join(info.labels) for info in (prepared.info, model.info))
        raise RunError(f"{model.path}: its data have other labels now ({now}) than when it was trained ({then})")
    if split not in prepared.splits:
        raise RunError(f"{model.path}: no split '{split}': {did_you_mean(split, prepared.splits)}")
    return list(prepared.splits[split])


def _rows_of_file(model: LoadedRun, file: Path) -> list[Row]:
    """Canonical rows of a file, under the label names and the cleaning of texts that the run had."""
    from peftkit.data.mapping import canonical_rows
    from peftkit.data.sources import find, read

    task = model.recipe.task
    data = replace(model.recipe, data={"source": str(file), "splits": {}, "weights": None}).data
    with tempfile.TemporaryDirectory() as folder:
        raw = [read(source, data, Path(folder), f"raw{number}") for number, source in enumerate(find(data))]
        rows, _ = canonical_rows(raw, task, data, model.info, Path(folder))
        return list(rows.data)


def _outputs(model: LoadedRun, rows: list[Row]) -> dict[str, Any]:
    from peftkit.data.batching import pass_tokens
    from peftkit.data.pipeline import encode_rows
    from peftkit.evaluation import runner
    from peftkit.models import policy
    from peftkit.training.step import TaskModule

    model.merge()
    device = next(model.model.parameters()).device
    dtype = policy.dtype_for(model.recipe.model, device)
    return runner.predict(
        TaskModule(model.loaded, model.recipe.task, model.info),
        encode_rows(rows, model.tokenizer, model.recipe, model.info),
        model.tokenizer,
        device=device,
        batch_size=model.recipe.evaluation.batch_size,
        tokens=pass_tokens(model.recipe.training, device.type),
        autocast=lambda: policy.autocast(dtype, device),
    )
