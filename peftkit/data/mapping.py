"""Raw rows → the task's canonical rows, checked, and small arrays of what the later steps need of each row."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftkit.data.loading import from_json
from peftkit.data.problems import Problems, located
from peftkit.data.source import PLACE, SPLITS
from peftkit.data.steps import EXAMPLES, CleaningStep
from peftkit.data.tables import iterate, write_rows
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig
from peftkit.schema.task import Task
from peftkit.schema.types import Row, TaskInfo

if TYPE_CHECKING:
    from datasets import Dataset

ARRAYS = {"source": "q", "split": "q", "text": "Q", "label": "Q", "digest": "Q", "document": "Q", "stratum": "q"}
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\u200b\u2060\ufeff]")


@dataclass(frozen=True)
class Rows:
    """Canonical rows of all splits and sources on disk, and arrays [rows] about each."""

    data: Dataset
    source: np.ndarray
    """Number of its source, int64."""
    split: np.ndarray
    """Its split in the source, an index into ``SPLITS``; int64."""
    text: np.ndarray
    """Hash of the row's identity: of its text without case and spacing, or of all that a language model reads of it;
    uint64."""
    label: np.ndarray
    """Hash of the label, uint64."""
    digest: np.ndarray
    """Hash of the row without its place, uint64."""
    document: np.ndarray
    """Hash of the document's name, or 0; uint64."""
    stratum: np.ndarray
    """Index into ``strata``, int64."""
    strata: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.text)

    def place(self, row: int) -> str:
        """``file:line`` of a row, for messages."""
        place = self.data.select_columns(["_file", "_line"])[int(row)]
        return f"{place['_file']}:{place['_line']}"


def canonical_rows(
    raw: Sequence[Mapping[str, Dataset]], task: Task, data: DataConfig, info: TaskInfo, folder: Path
) -> tuple[Rows, list[CleaningStep]]:
    """Every row of every source's splits under the task's own columns; writes ``canonical.arrow`` into ``folder``.

    Raises:
        DataError: bad rows, up to ten in one message; or no row is left.
    """
    mapper = _Mapper(task, data, info)
    table = write_rows(mapper.rows(raw), folder, "canonical")
    mapper.problems.check()
    if table is None:
        raise DataError("no row is left: every text is empty")
    columns = {name: np.frombuffer(values, dtype=values.typecode) for name, values in mapper.arrays.items()}
    steps = [CleaningStep(*step, count, mapper.examples(step)) for step, count in mapper.counts.items()]
    return Rows(table, **columns, strata=tuple(mapper.strata)), steps


class _Mapper:
    """Maps rows one by one; collects bad rows, cleaning steps, and the arrays of ``Rows``."""

    def __init__(self, task: Task, data: DataConfig, info: TaskInfo) -> None:
        self.task, self.data, self.info = task, data, info
        self.problems = Problems()
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.details: defaultdict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
        self.places: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
        self.arrays = {name: array(kind) for name, kind in ARRAYS.items()}
        self.strata: dict[str, int] = {}

    def rows(self, raw: Sequence[Mapping[str, Dataset]]) -> Iterator[Row]:
        for source, splits in enumerate(raw):
            for split, table in splits.items():
                for row in map(from_json, iterate(table)) if self.task.json_rows else iterate(table):
                    if (canonical := self._canonical(row, split)) is not None:
                        self._append(canonical, source, SPLITS.index(split))
                        yield canonical

    def _canonical(self, row: Row, split: str) -> Row | None:
        """The canonical row; None for a bad row (a problem) and an empty one (a problem or dropped)."""
        if (column := self.task.null_word(row, self.data)) is not None and not self._keeps(row, split, column):
            return None
        try:
            canonical = self.task.canonical(row, self.data, self.info)
        except DataError as error:
            if self._is_empty(row, error.column):
                self._add_empty(row, split, error.column)
            else:
                self.problems.add(located(error, row["_file"], row["_line"], path=row.get("_path")))
            return None
        action = self.data.cleaning.control_characters
        if action != "off" and (changed := self.task.with_text(canonical, clean_text)) != canonical:
            strip = action == "strip"
            self._count("control_characters", split, "changed" if strip else "reported", row)
            canonical = changed if strip else canonical
        if self.task.is_blank(canonical):
            self._add_empty(row, split, self._blank_column(row))
            return None
        self._add_remarks(row, split)
        return {**canonical, **{name: row[name] for name in PLACE if name in row}}

    def _keeps(self, row: Row, split: str, column: str) -> bool:
        """Whether a row stays that has only a word for a missing value in a column; counts it."""
        action = self.data.cleaning.null_words
        if action == "error":
            message = f"expected a value, found {row[column]!r}; fill or remove the row, or set"
            hint = "data.cleaning.null_words=drop"
            self.problems.add(DataError(f"{message} {hint}", file=row["_file"], line=row["_line"], column=column))
        else:
            dropped = action == "drop"
            self._count(
                "null_words",
                split,
                "dropped" if dropped else "reported",
                row,
                f": {column} {row[column]!r} ({'' if dropped else 'see '}data.cleaning.null_words)",
            )
        return action is None

    def _count(self, name: str, split: str, action: str, row: Row, what: str = "") -> None:
        step = (name, split, action)
        self.counts[step] += 1
        if self.counts[step] <= EXAMPLES:
            self.places[step].append(f"{row['_file']}:{row['_line']}{what}")

    def _add_remarks(self, row: Row, split: str) -> None:
        remarks = list(self.task.remarks(row, self.data, self.info))
        for name in dict.fromkeys(name for name, _ in remarks):
            self._count(name, split, "reported", row)
            self.details[name, split, "reported"].update(detail for step, detail in remarks if step == name and detail)

    def examples(self, step: tuple[str, str, str]) -> tuple[str, ...]:
        """What a step was about, each with its rows where not all share it; else the places of its first rows."""
        details, rows = self.details[step], self.counts[step]
        few = {detail: f" ({n} row{'s' if n > 1 else ''})" for detail, n in details.items() if n != rows}
        shown = [f"{detail}{few.get(detail, '')}" for detail in details]
        return (", ".join(shown),) if shown else tuple(self.places[step])

    def _is_empty(self, row: Row, column: str | None) -> bool:
        """Whether a row was refused for an empty column other than the label."""
        if column is None or column in self.data.label_columns or column not in row:
            return False
        return row[column] is None or (isinstance(row[column], str) and not row[column].strip())

    def _blank_column(self, row: Row) -> str | None:
        """The first column of a text that is blank in the row."""
        columns = [name for name in (self.data.text, self.data.text_pair) if name is not None and name in row]
        return next((name for name in columns if not str(row[name] or "").strip()), (*columns, None)[0])

    def _add_empty(self, row: Row, split: str, column: str | None) -> None:
        if self.data.cleaning.empty == "drop":
            self._count("empty", split, "dropped", row)
            return
        value = "null" if column and row.get(column) is None else "an empty text"
        message = f"expected text, found {value}; fill or remove the row, or set data.cleaning.empty=drop"
        error = DataError(message, column=column)
        self.problems.add(located(error, row["_file"], row["_line"], path=row.get("_path")))

    def _append(self, row: Row, source: int, split: int) -> None:
        stratum = self.task.stratum(row)
        content = {name: value for name, value in row.items() if name not in PLACE}
        values = {
            "source": source,
            "split": split,
            "text": hash64(self.task.identity(row)),
            "label": hash64(stratum or repr(row.get("label", row.get("labels")))),
            "digest": hash64(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)),
            "document": hash64(row["_document"]) if row.get("_document") else 0,
            "stratum": self.strata.setdefault(stratum, len(self.strata)),
        }
        for name, value in values.items():
            self.arrays[name].append(value)


def clean_text(text: str) -> str:
    """The text without control characters; other line ends become a newline.

    Joiners (U+200C, U+200D) stay: they carry meaning in Persian and Hindi, and hold emoji together.
    """
    return _CONTROL.sub("", _LINE_ENDS.sub("\n", text))


def hash64(text: str) -> int:
    """The same 64-bit number for the same text, on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def describe(raw: Sequence[Mapping[str, Dataset]], task: Task, data: DataConfig) -> TaskInfo:
    """What the task must know of all rows first; raises DataError with the file."""
    # sources that are not merged need not have the same columns, so each is described by itself
    infos = [
        _with_file(splits, lambda splits: task.describe(splits, data))
        for splits in ([_merged(raw)] if task.merges_sources else raw)
    ]
    return infos[0]


def describe_file(raw: Sequence[Mapping[str, Dataset]], task: Task, data: DataConfig, info: TaskInfo) -> TaskInfo:
    """How a file of further rows is read for a trained run; raises DataError with the file."""
    return _with_file(raw[0], lambda splits: task.describe_file(splits, data, info))


def _with_file(splits: Mapping[str, Dataset], read: Callable[[Mapping[str, Dataset]], TaskInfo]) -> TaskInfo:
    """What ``read`` returns for the splits; a DataError without a line gets their file."""
    try:
        return read(splits)
    except DataError as error:
        first: Any = next(iter(splits.values()))[0]
        raise error if error.line else located(error, first["_file"], None) from None


def _merged(raw: Sequence[Mapping[str, Dataset]]) -> Mapping[str, Dataset]:
    """The splits of several sources as one."""
    from datasets import concatenate_datasets

    if len(raw) == 1:
        return raw[0]
    merged = {}
    for split in SPLITS:
        tables = [splits[split] for splits in raw if split in splits]
        if tables:
            common = [name for name in tables[0].column_names if all(name in other.column_names for other in tables)]
            try:
                merged[split] = concatenate_datasets([table.select_columns(common) for table in tables])
            except ValueError as error:
                types = f"the sources' columns are of different types: {str(error).splitlines()[0]}"
                raise DataError(f"data.source: {types}; give them one type") from None
    return merged
