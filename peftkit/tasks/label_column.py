"""Reads a label column: its classes, the kind of problem, and what a single label means.

Works on Arrow columns, so that a data set of a million rows is described in a second. Labels may be whole numbers,
words, booleans, a ``ClassLabel`` feature, fractions (a regression), a list per row, or several 0/1 columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from peftkit.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

MANY_CLASSES = 50
"""From so many classes on, more than one class for every two rows is taken for a mistake."""


@dataclass(frozen=True)
class LabelColumn:
    """One column of one split, with the place of each row."""

    name: str
    split: str
    values: pa.Array
    names: tuple[str, ...] | None
    """Class names of a ``ClassLabel`` feature (of the items of a list column)."""
    files: Sequence[str]
    lines: Sequence[int]

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        """Raises DataError at a row of this column."""
        if position is None or not self.files:
            raise DataError(message, column=self.name)
        raise DataError(message, file=self.files[position], line=self.lines[position], column=self.name)

    @property
    def is_list(self) -> bool:
        """Whether a row holds several labels."""
        import pyarrow.types as types

        kind = self.values.type
        return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)

    @property
    def is_words(self) -> bool:
        """Whether the labels are strings."""
        import pyarrow.types as types

        return types.is_string(self.values.type) or types.is_large_string(self.values.type)

    def refuse_nulls(self) -> None:
        """Raises DataError at the first row without a label (null, not-a-number, or -1 of a ``ClassLabel``)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        missing = pc.is_null(self.values, nan_is_null=pa.types.is_floating(self.values.type))
        if self.is_list and self._flat().null_count:
            self.fail("no label inside a list of labels; take the null out", self.first(None))
        if self.is_words:
            missing = pc.or_(missing, pc.equal(pc.fill_null(pc.utf8_trim_whitespace(self.values), ""), ""))
        if self.names is not None and pa.types.is_integer(self.values.type):
            missing = pc.or_(missing, pc.fill_null(pc.less(self.values, 0), True))
        position = pc.index(missing, True).as_py()
        if position >= 0:
            count = pc.sum(missing).as_py()
            self.fail(
                f"no label in {count:,} of {len(self.values):,} rows of the {self.split} split, here first; fill or "
                "drop them, or choose another split with data.splits",
                position,
            )

    def distinct(self) -> list[Any]:
        """The different labels, as Python values; those of list rows are flattened."""
        return self._flat().unique().to_pylist()

    def counts(self) -> dict[Any, int]:
        """Label → rows that have it."""
        pairs = self._flat().value_counts().to_pylist()
        return {pair["values"]: pair["counts"] for pair in pairs}

    def first(self, value: Any) -> int:
        """Index of the first row with this label."""
        import pyarrow as pa
        import pyarrow.compute as pc

        flat = self._flat()
        same = pc.is_null(flat) if value is None else pc.equal(flat, pa.scalar(value, flat.type))
        position = pc.index(same, True).as_py()
        return pc.list_parent_indices(self.values)[position].as_py() if self.is_list else position

    def _flat(self) -> pa.Array:
        import pyarrow.compute as pc

        return pc.list_flatten(self.values) if self.is_list else self.values


def require_column(split: str, dataset: Any, name: str) -> None:
    """Raises DataError naming the nearest column when ``dataset`` has none of this name."""
    if name in dataset.column_names:
        return
    columns = [column for column in dataset.column_names if not column.startswith("_")]
    near = did_you_mean(name, columns)
    listed = "" if near.startswith("known names") else f" Columns found: {', '.join(columns)}."
    file = dataset[0].get("_file") if len(dataset) else None
    raise DataError(f"no column '{name}' in the {split} split: {near}{listed}", file=file)


def read_column(split: str, dataset: Any, name: str) -> LabelColumn:
    """The column ``name`` of a ``datasets.Dataset``; raises DataError when there is none."""
    require_column(split, dataset, name)
    columns = [column for column in (name, "_file", "_line") if column in dataset.column_names]
    table = dataset.select_columns(columns).with_format("arrow")[:]
    places = "_file" in columns and "_line" in columns
    return LabelColumn(
        name=name,
        split=split,
        values=table.column(name).combine_chunks(),
        names=_class_names(dataset.features[name]),
        files=_Lazy(table.column("_file")) if places else (),
        lines=_Lazy(table.column("_line")) if places else (),
    )


class _Lazy(Sequence[Any]):
    """An Arrow column read one value at a time."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, position: Any) -> Any:
        return self._column[position].as_py()


def _class_names(feature: Any) -> tuple[str, ...] | None:
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return tuple(names) if names else None


def whole_number(value: Any) -> int | None:
    """The integer that a label spells (3, 3.0, "3", " 03"), or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.removeprefix("-").isdecimal() else None
    number = float(value) if isinstance(value, int | float) else math.nan
    return int(number) if math.isfinite(number) and number == int(number) else None


def number(value: Any) -> float | None:
    """The finite number that a label spells, or None."""
    try:
        spelled = float(value)
    except (TypeError, ValueError):
        return None
    return spelled if math.isfinite(spelled) and not isinstance(value, bool) else None


def name_of(value: Any) -> str:
    """The class name that a label without a given name gets: "World" → "World", 2.0 → "2", True → "True"."""
    if isinstance(value, str):
        return value.strip()
    whole = whole_number(value)
    return str(whole if whole is not None else value)


def sorted_names(values: Sequence[Any]) -> tuple[str, ...]:
    """Class names in id order: whole numbers by size, words by alphabet."""
    names = {name_of(value) for value in values}
    if all(whole_number(name) is not None for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def refuse_mixed(column: LabelColumn) -> None:
    """Raises DataError when some labels are numbers and others words, which a shifted column or a header often is."""
    values = column.distinct()
    numbers = [value for value in values if number(value) is not None]
    words = [value for value in values if number(value) is None]
    if numbers and words:
        rare = min(numbers, words, key=lambda group: sum(column.counts()[value] for value in group))
        shown = ", ".join(repr(value) for value in rare[:3])
        column.fail(
            f"labels of mixed kinds: numbers ({len(numbers)} different) and words ({len(words)} different); the rarer "
            f"are {shown}, here first. Write them one way, or list all of them in data.labels",
            column.first(rare[0]),
        )


def class_id(value: Any, labels: tuple[str, ...], integers: str) -> int | None:
    """The id that a label of the source stands for, or None when it is not among ``labels``.

    Args:
        integers: "ids" when whole numbers of the source count from 0 into ``labels``; "names" when they are names.
    """
    known = _ids(labels)
    whole = whole_number(value)
    in_range = whole is not None and 0 <= whole < len(labels)
    if integers == "ids" and in_range and not isinstance(value, str):
        return whole
    position = known.get(name_of(value))
    if position is None and integers == "ids" and in_range:
        return whole
    return position


@lru_cache(maxsize=64)
def _ids(labels: tuple[str, ...]) -> dict[str, int]:
    return {name: position for position, name in enumerate(labels)}


def reading_of_integers(columns: Sequence[LabelColumn], labels: tuple[str, ...]) -> Literal["names", "ids"]:
    """Whether whole numbers in the columns are class ids or class names, judged over all splits.

    Numbers that all stand in ``labels`` are names; otherwise they are ids. A ``ClassLabel`` feature holds ids.
    """
    if any(column.names is not None for column in columns):
        return "ids"
    values = [value for column in columns for value in column.distinct()]
    whole = [value for value in values if whole_number(value) is not None]
    return "ids" if whole and any(name_of(value) not in _ids(labels) for value in whole) else "names"


def check_known(column: LabelColumn, labels: tuple[str, ...], integers: str, *, given: bool) -> None:
    """Raises DataError at the first row whose label is not among ``labels``.

    Args:
        given: the names were listed in the recipe or by the source, rather than found in the training split.
    """
    for value in column.distinct():
        if class_id(value, labels, integers) is not None:
            continue
        shown = repr(value)
        where = column.first(value)
        if given:
            ids = f" (or ids 0 to {len(labels) - 1})" if integers == "ids" else ""
            hint = did_you_mean(name_of(value), labels)
            column.fail(f"label {shown} is not among the {len(labels)} labels given{ids}: {hint}", where)
        column.fail(
            f"label {shown} of the {column.split} split does not occur in training: "
            f"{did_you_mean(name_of(value), labels)} List it in data.labels if it is meant",
            where,
        )


def refuse_too_many(column: LabelColumn, classes: int) -> None:
    """Raises DataError when a label column looks like free text or measurements."""
    rows = len(column.values)
    if classes >= MANY_CLASSES and classes * 2 > rows and not column.is_list:
        example = column.values[0].as_py()
        column.fail(
            f"{classes:,} different labels in {rows:,} rows, such as {str(example)[:60]!r}: these are not classes. Is "
            "data.label the right column? For numbers to be predicted set task.problem_type=regression"
        )
