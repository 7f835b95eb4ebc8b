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

from peftkit.data.problems import require_column
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
    table: pa.Table
    """The column, with ``_file`` and ``_line`` where they are known."""

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        """Raises DataError at a row of this column."""
        if position is None or not {"_file", "_line"} <= {*self.table.column_names}:
            raise DataError(message, column=self.name)
        file, line = (self.table[name][position].as_py() for name in ("_file", "_line"))
        raise DataError(message, file=file, line=line, column=self.name)

    @property
    def is_list(self) -> bool:
        """Whether a row holds several labels."""
        import pyarrow.types as types

        kind = self.values.type
        return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)

    @property
    def shape(self) -> str:
        """What a row holds, for messages: lists, words or numbers."""
        if self.is_list:
            return "lists"
        return "words" if str(self.values.type) in ("string", "large_string") else "numbers"

    def refuse_nulls(self) -> None:
        """Raises DataError at the first row without a label (null, not-a-number, or -1 of a ``ClassLabel``)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        missing = pc.is_null(self.values, nan_is_null=pa.types.is_floating(self.values.type))
        if self.is_list and self._flat().null_count:
            self.fail("no label inside a list of labels; take the null out", self.first(None))
        if self.shape == "words":
            missing = pc.or_(missing, pc.equal(pc.fill_null(pc.utf8_trim_whitespace(self.values), ""), ""))
        if self.names is not None and pa.types.is_integer(self.values.type):
            missing = pc.or_(missing, pc.fill_null(pc.less(self.values, 0), True))
        position = pc.index(missing, True).as_py()
        if position >= 0:
            rows = f"{pc.sum(missing).as_py():,} of {len(self.values):,} rows of the {self.split} split"
            hint = "fill or drop them, or choose another split with data.splits"
            self.fail(f"no label in {rows}, here first; {hint}", position)

    def distinct(self) -> list[Any]:
        """The different labels; those of list rows are flattened."""
        return self._flat().unique().to_pylist()

    def counts(self) -> dict[Any, int]:
        """Label → rows that have it."""
        return {pair["values"]: pair["counts"] for pair in self._flat().value_counts().to_pylist()}

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


def read_column(split: str, dataset: Any, name: str) -> LabelColumn:
    """The column ``name`` of a ``datasets.Dataset``; raises DataError when there is none, or a row has no label."""
    require_column(dataset, name, "data.label")
    columns = [column for column in (name, "_file", "_line") if column in dataset.column_names]
    table = dataset.select_columns(columns).with_format("arrow")[:]
    feature = dataset.features[name]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    column = LabelColumn(name, split, table.column(name).combine_chunks(), tuple(names) if names else None, table)
    column.refuse_nulls()
    return column


def whole_number(value: Any) -> int | None:
    """The integer that a label spells (3, 3.0, "3", " 03"), or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.removeprefix("-").isdecimal() else None
    number = float(value) if isinstance(value, int | float) else math.nan
    return int(number) if math.isfinite(number) and number == int(number) else None


def indicator(value: Any) -> int | None:
    """The 0 or 1 that a label spells, or None."""
    flag = whole_number(int(value) if isinstance(value, bool) else value)
    return flag if flag in (0, 1) else None


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
    whole = all(whole_number(name) is not None for name in names)
    return tuple(sorted(names, key=int if whole else None))


def refuse_mixed(column: LabelColumn) -> None:
    """Raises DataError when some labels are numbers and others words, which a shifted column or a header often is."""
    values = column.distinct()
    numbers = [value for value in values if number(value) is not None]
    words = [value for value in values if number(value) is None]
    if numbers and words:
        counts = column.counts()
        rare = min(numbers, words, key=lambda group: sum(counts[value] for value in group))
        kinds = f"numbers ({len(numbers)} different) and words ({len(words)} different)"
        shown = f"the rarer are {', '.join(map(repr, rare[:3]))}, here first"
        hint = "Write them one way, or list all of them in data.labels"
        column.fail(f"labels of mixed kinds: {kinds}; {shown}. {hint}", column.first(rare[0]))


def class_id(value: Any, labels: tuple[str, ...], integers: str) -> int | None:
    """The id that a label of the source stands for, or None when it is not among ``labels``; see ``TaskInfo``."""
    whole = whole_number(value)
    is_id = integers == "ids" and whole is not None and 0 <= whole < len(labels)
    if is_id and not isinstance(value, str):
        return whole
    return _ids(labels).get(name_of(value), whole if is_id else None)


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
    """Raises DataError at the first row whose label is not among ``labels``, ``given`` by recipe or source."""
    for value in column.distinct():
        if class_id(value, labels, integers) is None:
            near = did_you_mean(name_of(value), labels)
            message = f"does not occur in training: {near} List it in data.labels if it is meant"
            if given:
                ids = f" (or ids 0 to {len(labels) - 1})" if integers == "ids" else ""
                message = f"is not among the {len(labels)} labels given{ids}: {near}"
            column.fail(f"label {value!r} of the {column.split} split {message}", column.first(value))


def refuse_too_many(column: LabelColumn, classes: int) -> None:
    """Raises DataError when a label column looks like free text or measurements."""
    rows = len(column.values)
    if classes >= MANY_CLASSES and classes * 2 > rows and not column.is_list:
        shown = f"{classes:,} different labels in {rows:,} rows, such as {str(column.values[0])[:60]!r}"
        hint = "Is data.label the right column? For numbers to be predicted set task.problem_type=regression"
        column.fail(f"{shown}: these are not classes. {hint}")
