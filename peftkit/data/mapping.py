"""Raw rows → the task's canonical rows, checked, with what the later steps need of each row in small arrays."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftkit.data.problems import Problems, located
from peftkit.data.steps import CleaningStep, StepLog
from peftkit.data.tables import iterate, write_rows
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig
from peftkit.schema.task import Task
from peftkit.schema.types import Row, TaskInfo

if TYPE_CHECKING:
    from datasets import Dataset

PARTS = ("train", "validation", "test")
PLACE = ("_file", "_line", "_document")
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\u200b\u2060\ufeff]")


@dataclass(frozen=True)
class Rows:
    """Canonical rows of all splits and sources on disk, and arrays that say what is needed of each, [rows]."""

    data: Dataset
    source: np.ndarray
    """Which of the sources it came from, int64."""
    part: np.ndarray
    """Split of the source: 0 train, 1 validation, 2 test; int64."""
    text: np.ndarray
    """Hash of the text without case and spacing; equal texts have equal hashes, uint64."""
    label: np.ndarray
    """Hash of the label; uint64."""
    digest: np.ndarray
    """Hash of the row without its place, uint64."""
    document: np.ndarray
    """Hash of the document's name; 0 where a row has none, uint64."""
    stratum: np.ndarray
    """Index into ``strata``, int64."""
    strata: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.text)

    def place(self, row: int) -> str:
        """``file:line`` of a row, for messages."""
        held = self.data.select_columns(["_file", "_line"])[int(row)]
        return f"{held['_file']}:{held['_line']}"


@dataclass
class _Arrays:
    """Grows while rows are written."""

    source: array[int] = field(default_factory=lambda: array("q"))
    part: array[int] = field(default_factory=lambda: array("q"))
    text: array[int] = field(default_factory=lambda: array("Q"))
    label: array[int] = field(default_factory=lambda: array("Q"))
    digest: array[int] = field(default_factory=lambda: array("Q"))
    document: array[int] = field(default_factory=lambda: array("Q"))
    stratum: array[int] = field(default_factory=lambda: array("q"))
    strata: dict[str, int] = field(default_factory=dict)

    def add(self, row: Row, task: Task, source: int, part: int) -> None:
        stratum = task.stratum(row)
        content = {name: value for name, value in row.items() if name not in PLACE}
        self.source.append(source)
        self.part.append(part)
        self.text.append(hash64(" ".join(task.text_of(row).casefold().split())))
        self.label.append(hash64(stratum or repr(row.get("label", row.get("labels")))))
        self.digest.append(hash64(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)))
        self.document.append(hash64(row["_document"]) if row.get("_document") else 0)
        self.stratum.append(self.strata.setdefault(stratum, len(self.strata)))


def canonical_rows(
    raw: Sequence[Mapping[str, Dataset]], task: Task, data: DataConfig, info: TaskInfo, folder: Path
) -> tuple[Rows, list[CleaningStep]]:
    """Every row of every split under the task's own columns, with control characters and empty rows dealt with.

    Args:
        raw: raw splits, one mapping a source.
        folder: where ``canonical.arrow`` is written.

    Raises:
        DataError: bad rows, up to ten in one message; or nothing is left.
    """
    problems, log, arrays = Problems(), StepLog(), _Arrays()
    made = write_rows(_canonical(raw, task, data, info, problems, log, arrays), folder, "canonical")
    problems.check()
    if made is None:
        raise DataError("no row is left: every text is empty")
    names = [name for name in Rows.__dataclass_fields__ if name not in ("data", "strata")]
    columns = {name: np.frombuffer(held := getattr(arrays, name), dtype=held.typecode) for name in names}
    return Rows(made, **columns, strata=tuple(arrays.strata)), log.steps()


def _canonical(
    raw: Sequence[Mapping[str, Dataset]],
    task: Task,
    data: DataConfig,
    info: TaskInfo,
    problems: Problems,
    log: StepLog,
    arrays: _Arrays,
) -> Iterator[Row]:
    for source, splits in enumerate(raw):
        for part, held in splits.items():
            for row in iterate(held):
                made = _one(row, part, task, data, info, problems, log)
                if made is not None:
                    arrays.add(made, task, source, PARTS.index(part))
                    yield made


def _one(
    row: Row, part: str, task: Task, data: DataConfig, info: TaskInfo, problems: Problems, log: StepLog
) -> Row | None:
    """The canonical row; None for one that is bad (noted) or empty (noted or counted)."""
    place = f"{row['_file']}:{row['_line']}"
    try:
        made = task.canonical(row, data, info)
    except DataError as error:
        if not _is_blank(row, error.column, data):
            problems.add(located(error, row["_file"], row["_line"]))
            return None
        _empty(row, part, error.column, data, problems, log)
        return None
    if data.cleaning.control_characters != "off":
        changed = task.with_text(made, clean_text)
        if changed != made:
            log.add(
                "control_characters",
                part,
                "changed" if data.cleaning.control_characters == "strip" else "reported",
                place,
            )
            made = changed if data.cleaning.control_characters == "strip" else made
    if task.is_blank(made):
        _empty(row, part, data.text if data.text in row else None, data, problems, log)
        return None
    return {**made, **{name: row[name] for name in PLACE if name in row}}


def _empty(row: Row, part: str, column: str | None, data: DataConfig, problems: Problems, log: StepLog) -> None:
    if data.cleaning.empty == "drop":
        log.add("empty", part, "dropped", f"{row['_file']}:{row['_line']}")
    else:
        found = "null" if column and row.get(column) is None else "an empty text"
        said = f"expected text, found {found}; fill or remove the row, or set data.cleaning.empty=drop"
        problems.add(DataError(said, file=row["_file"], line=row["_line"], column=column))


def _is_blank(row: Row, column: str | None, data: DataConfig) -> bool:
    labels = (data.label,) if isinstance(data.label, str) else data.label
    if column is None or column in labels or column not in row:
        return False
    value = row[column]
    return value is None or (isinstance(value, str) and not value.strip())


def clean_text(text: str) -> str:
    """The text without control characters; other line ends become a newline.

    Joiners (U+200C, U+200D) stay: they carry meaning in Persian and Hindi, and hold emoji together.
    """
    return _CONTROL.sub("", _LINE_ENDS.sub("\n", text))


def hash64(text: str) -> int:
    """The same 64-bit number for the same text, on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def describe(raw: Sequence[Mapping[str, Dataset]], task: Task, data: DataConfig) -> TaskInfo:
    """What the task learns of all rows of all sources first; raises DataError with the file it concerns."""
    # sources that are not merged need not have the same columns, so each is looked at by itself
    alone = [raw[0] if len(raw) == 1 else _merged(raw)] if task.merges_sources else raw
    first, *_ = [_describe_one(splits, task, data) for splits in alone]
    return first


def _describe_one(splits: Mapping[str, Dataset], task: Task, data: DataConfig) -> TaskInfo:
    try:
        return task.describe(splits, data)
    except DataError as error:
        if error.line is None and error.file is None:
            first: Any = next(iter(splits.values()))[0]
            raise located(error, first["_file"], None) from None
        raise


def _merged(raw: Sequence[Mapping[str, Dataset]]) -> Mapping[str, Dataset]:
    """The splits of several sources as one."""
    from datasets import concatenate_datasets

    merged = {}
    for part in PARTS:
        held = [splits[part] for splits in raw if part in splits]
        if held:
            common = [name for name in held[0].column_names if all(name in other.column_names for other in held)]
            try:
                merged[part] = concatenate_datasets([split.select_columns(common) for split in held])
            except ValueError as error:
                said = f"the sources' columns are of different types: {str(error).splitlines()[0]}"
                raise DataError(f"data.source: {said}; give them one type") from None
    return merged
