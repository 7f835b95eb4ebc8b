"""Raw rows of a source → tables on disk: the source's own columns, with ``_file`` and ``_line``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.data.problems import Problems
from peftkit.data.source import PLACE, Source
from peftkit.data.steps import EXAMPLES, CleaningStep
from peftkit.data.tables import write_rows
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig
from peftkit.schema.task import Task
from peftkit.schema.types import Row

if TYPE_CHECKING:
    from datasets import Dataset


def read_sources(
    sources: Sequence[Source], task: Task, data: DataConfig, folder: Path, steps: list[CleaningStep] | None = None,
    keys: KeyCheck | None = None,
) -> list[dict[str, Dataset]]:  # fmt: skip
    """The raw rows of each source by split, memory-mapped from files ``raw*`` in ``folder``.

    How files were read that are not plain is added to ``steps``; ``keys`` sees every row.

    Raises DataError for bad files or rows, up to ten of them in one message, and for a split without rows.
    """
    steps, keys = [] if steps is None else steps, KeyCheck() if keys is None else keys
    return [
        _read_splits(source, task, data, folder, f"raw{number}", steps, keys) for number, source in enumerate(sources)
    ]


def as_json(row: Row) -> Row:
    """The row with its values as JSON, which a table stores without making their types and keys one; null stays."""
    return {name: value if name in PLACE or value is None else _dumped(value) for name, value in row.items()}


def from_json(row: Row) -> Row:
    """The row that ``as_json`` was given; what JSON cannot hold is a mapping from its type's name to its text."""
    return {name: value if name in PLACE or value is None else json.loads(value) for name, value in row.items()}


def _dumped(value: Any) -> str:
    return json.dumps(value, default=lambda other: {type(other).__name__: str(other)[:60]})


class KeyCheck:
    """Notices columns that some rows lack, so that an error about the value that is missing can name the cause."""

    def __init__(self) -> None:
        self._absent: dict[str, tuple[int, str]] = {}
        self._present: set[str] = set()

    def watch(self, rows: Iterable[Row], columns: Iterable[str]) -> Iterator[Row]:
        """The rows as they are."""
        columns = [*columns]
        for row in rows:
            for name in columns:
                if name in row:
                    self._present.add(name)
                else:
                    count, first = self._absent.get(name, (0, ""))
                    keys = ", ".join(key for key in row if key not in PLACE) or "none"
                    first = first or f"{row.get('_file')}:{row.get('_line')}, whose keys are {keys}"
                    self._absent[name] = (count + 1, first)
            yield row

    def explained(self, error: DataError) -> DataError:
        """The error, with the rows that lack its column where others have it."""
        column = error.column
        if column not in self._absent or column not in self._present:
            return error
        count, first = self._absent[column]
        lack = "1 row has" if count == 1 else f"{count:,} rows have"
        cause = f"{lack} no {column!r} at all, first {first}: give all rows the same keys"
        error.message, error.args = f"{error.message}. {cause}", (f"{error}. {cause}",)
        return error


def _read_splits(
    source: Source, task: Task, data: DataConfig, folder: Path, prefix: str, steps: list[CleaningStep], keys: KeyCheck
) -> dict[str, Dataset]:
    problems, splits = Problems(), {}
    columns = task.source_columns(data)
    used = frozenset({*columns, *PLACE})
    for split in source.splits:
        rows = keys.watch(source.rows(split, problems), columns)
        try:
            raw = write_rows(map(as_json, rows) if task.json_rows else rows, folder, f"{prefix}-{split}", used)
        except DataError as error:
            raise error if problems.count and error is problems.shown[-1] else problems.fatal(error) from None
        if raw is not None:
            splits[split] = raw if task.json_rows else _with_class_names(raw, source.class_names(split))
            if notes := problems.take_notes():
                shown = notes if len(notes) <= EXAMPLES else [*notes[:EXAMPLES], f"… and {len(notes) - EXAMPLES} more"]
                steps.append(CleaningStep("reading", split, "reported", len(raw), tuple(shown)))
        elif not problems.count:
            raise DataError(f"the {split} split has no rows", file=source.place(split))
    problems.check()
    return splits


def _with_class_names(raw: Dataset, names: dict[str, list[str]]) -> Dataset:
    """The table with the class names of the source as features of its columns."""
    from datasets import ClassLabel, Dataset, DatasetInfo, List, Value

    features = raw.features.copy()
    for column, classes in names.items():
        kind = features.get(column)
        if isinstance(kind, Value):
            features[column] = ClassLabel(names=classes)
        elif isinstance(kind, List) and isinstance(kind.feature, Value):
            features[column] = List(ClassLabel(names=classes))
    return Dataset(raw.data, info=DatasetInfo(features=features)) if features != raw.features else raw
