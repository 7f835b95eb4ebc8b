"""Raw rows of a source → tables on disk: the source's own columns, with ``_file`` and ``_line``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.data.problems import Problems
from peftkit.data.source import PLACE, Source
from peftkit.data.steps import EXAMPLES, CleaningStep
from peftkit.data.tables import write_rows
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig
from peftkit.schema.task import Task

if TYPE_CHECKING:
    from datasets import Dataset


def read_sources(
    sources: Sequence[Source], task: Task, data: DataConfig, folder: Path, steps: list[CleaningStep] | None = None
) -> list[dict[str, Dataset]]:
    """The raw rows of each source by split, memory-mapped from files ``raw*`` in ``folder``.

    How files were read that are not plain is added to ``steps``.

    Raises DataError for bad files or rows, up to ten of them in one message, and for a split without rows.
    """
    used = frozenset({*task.source_columns(data), *PLACE})
    steps = [] if steps is None else steps
    return [_read_splits(source, used, folder, f"raw{number}", steps) for number, source in enumerate(sources)]


def _read_splits(
    source: Source, used: frozenset[str], folder: Path, prefix: str, steps: list[CleaningStep]
) -> dict[str, Dataset]:
    problems, splits = Problems(), {}
    for split in source.splits:
        try:
            raw = write_rows(source.rows(split, problems), folder, f"{prefix}-{split}", used)
        except DataError as error:
            raise error if problems.count and error is problems.shown[-1] else problems.fatal(error) from None
        if raw is not None:
            splits[split] = _with_class_names(raw, source.class_names(split))
            if notes := problems.take_notes():
                shown = notes if len(notes) <= EXAMPLES else [*notes[:EXAMPLES], f"… and {len(notes) - EXAMPLES} more"]
                steps.append(CleaningStep("reading", split, "reported", len(raw), tuple(shown)))
        elif not problems.count:
            raise DataError(f"the {split} split has no rows", file=source.place(split))
    problems.check()
    return splits


def _with_class_names(raw: Dataset, names: dict[str, list[str]]) -> Dataset:
    """The table with the class names of the source as features of its columns."""
    from datasets import ClassLabel, Dataset, DatasetInfo, Value

    features = raw.features.copy()
    for column, classes in names.items():
        if isinstance(features.get(column), Value):
            features[column] = ClassLabel(names=classes)
    return Dataset(raw.data, info=DatasetInfo(features=features)) if features != raw.features else raw
