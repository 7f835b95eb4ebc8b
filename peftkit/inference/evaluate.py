"""Scores a finished run again: on a split of its own data, or on a file of rows with labels."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.data.loading import read_sources
from peftkit.data.mapping import canonical_rows, describe_file
from peftkit.data.pipeline import encode_rows, prepare
from peftkit.data.source import find_sources
from peftkit.data.steps import CleaningStep
from peftkit.distributed.process_group import ProcessGroup
from peftkit.errors import RunError, did_you_mean
from peftkit.evaluation import generation
from peftkit.evaluation.assessment import assess
from peftkit.evaluation.runner import in_order
from peftkit.evaluation.samples import Sample, WrittenTexts, choose_test_rows
from peftkit.export.folder import open_export
from peftkit.export.merging import MergeMode
from peftkit.inference.texts import data_options, print_notes
from peftkit.inference.trained_model import LoadedRun, load
from peftkit.schema.recipe import DataConfig, Recipe, replace
from peftkit.schema.types import Row

ALONE = ProcessGroup()


def evaluate(
    run: str | Path,
    *,
    split: str = "test",
    file: str | Path | None = None,
    merge: MergeMode = "auto",
    group: ProcessGroup = ALONE,
    delimiter: str | None = None,
    backend: str | None = None,
) -> dict[str, float]:
    """Metrics by name, as in the run's metrics.json.

    Args:
        run: a run's folder, or an exported one.
        split: train, validation or test of the run's own data, read, cleaned and split as in training.
        file: rows with the recipe's columns, in place of a split; their labels must be the run's.
        merge: as for ``peftkit.load``; False scores the adapter unmerged, as in training.
        group: processes that share the rows; all of them call this, and all get the metrics.
        delimiter: separator of a CSV ``file``, or "auto"; None takes the recipe's.
        backend: what predicts, as for ``peftkit.load``.

    Raises:
        RunError: not a finished run, no such split, the data's labels are no longer the run's, or there is no proven
            export for the backend.
        DataError: the file's rows are wrong.
    """
    export = group.run_collectively(lambda: open_export(Path(run)))
    data = None if file is None else _data_of_file(export.recipe, Path(file), delimiter)
    if data is not None:  # a missing file is reported before a model that cannot be had
        group.run_on_main(lambda: bool(find_sources(data)))
    model = group.main_first(lambda: load(export, merge=merge, device=group.device, backend=backend))
    rows = group.run_on_main(lambda: _rows_of_file(model, data) if data else _rows_of_split(model, split))
    name = group.run_on_main(lambda: model.choose_backend(rows).name)
    group.run_collectively(lambda: model.use_backend(name))
    outputs = _outputs(model, rows, group)
    written, evaluation = _test_texts(model, rows, group), model.recipe.evaluation
    assessment = group.run_on_main(lambda: assess(model.head, outputs, rows, evaluation, split=split, written=written))
    return {name: metric["value"] for name, metric in assessment["metrics"].items()}


def _rows_of_split(model: LoadedRun, split: str) -> list[Row]:
    prepared = prepare(model.recipe)
    if prepared.info.labels != model.info.labels:
        now, then = (", ".join(info.labels) for info in (prepared.info, model.info))
        raise RunError(f"{model.path}: the labels of its data are now {now}, but were {then} in training")
    if split not in prepared.splits:
        raise RunError(f"{model.path}: no split '{split}': {did_you_mean(split, prepared.splits)}")
    return list(prepared.splits[split])


def _data_of_file(recipe: Recipe, file: Path, delimiter: str | None) -> DataConfig:
    """The recipe's data section for rows of another file."""
    changes: dict[str, Any] = {"source": str(file), "splits": {}, "weights": None, "subset": None}
    return data_options(replace(recipe, data=changes), delimiter)


def _rows_of_file(model: LoadedRun, data: DataConfig) -> list[Row]:
    """Canonical rows of a file, with the label names and the text cleaning of the run."""
    task = model.recipe.task
    steps: list[CleaningStep] = []
    with tempfile.TemporaryDirectory() as folder:
        raw = read_sources(find_sources(data), task, data, Path(folder), steps)
        print_notes(note for step in steps for note in step.examples)
        info = describe_file(raw, task, data, model.info)
        rows, _ = canonical_rows(raw, task, data, info, Path(folder))
        return list(rows.data)


def _test_texts(model: LoadedRun, rows: list[Row], group: ProcessGroup) -> WrittenTexts | None:
    """What the model writes for the rows that ``evaluation.generation.test_rows`` chooses; None for none."""
    task, config = model.recipe.task, model.recipe.evaluation.generation
    chosen = choose_test_rows(rows, task, config) if model.head.writes_text else {}

    def write(part: list[tuple[int, Sample]]) -> list[str]:
        return generation.generate(
            model.model, model.tokenizer, [sample.prompt for _, sample in part], config,
            numbers=[number for number, _ in part], max_source=model.recipe.data.max_length,
        )  # fmt: skip

    return WrittenTexts.of(chosen, group.map_sharded(list(chosen.items()), write)) if chosen else None


def _outputs(model: LoadedRun, rows: list[Row], group: ProcessGroup) -> dict[str, Any]:
    """Outputs of every example in order; each process of the group takes every world_size-th."""
    split = group.run_collectively(lambda: encode_rows(rows, model.tokenizer, model.recipe, model.info))
    mine = np.arange(group.rank, len(split.lengths), group.world_size)
    part = split.select(mine) if group.world_size > 1 else split
    shards = group.gather(lambda: (mine, model.outputs(part, model.recipe.evaluation.batch_size)))
    outputs = in_order([shard for shard in shards if len(shard[0])], len(split.lengths))
    return dict(model.head.complete(outputs))
