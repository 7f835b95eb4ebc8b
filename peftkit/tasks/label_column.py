"""Reads a label column: its classes, the kind of problem, and what a single label means.

``peftkit.tasks.label_spelling`` says what one cell spells; here the cells of a column decide together:

| cells | learned |
|---|---|
| words, codes ("007", "1e5"), versions ("1.10"), true and false | one of several classes, named as written |
| whole numbers, also as 3.0 | one of several classes, named by the number |
| many different decimals | a number (regression) |
| up to 20 different decimals that repeat | asked: ``task.problem_type`` |
| numbers as people format them: 0,5, 1,000, 5% | asked: ``task.problem_type`` |
| numbers and words | refused |
| "a\\|b", "a; b", "a, b", where a or b occurs elsewhere | asked: ``data.label_separator`` |
| lists of names or ids, as such or in JSON or Python spelling | several labels |
| lists of one 0 or 1 (True or False) for each class | several labels, by place |
| objects, dates, bytes | refused |

It works on Arrow columns, so that a data set of a million rows is described in a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from peftkit.data.problems import require_column, shorten
from peftkit.errors import DataError, did_you_mean
from peftkit.tasks import label_spelling as spelling
from peftkit.tasks.null_words import is_null_word, without_null_words

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from peftkit.schema.recipe import DataConfig

MANY_CLASSES = 50
"""From so many classes on, more than one class for every two rows is taken for a mistake."""
MOST_LEVELS = 20
"""Up to so many different decimals, each twice or more on average, may be classes (half stars) or a number."""
Integers = Literal["names", "ids", "one_hot"]
AS_CLASSES = "task.problem_type=single_label_classification"
NUMERIC: tuple[spelling.Kind, ...] = ("whole", "decimal", "formatted")


@dataclass(frozen=True)
class LabelColumn:
    """One column of one split, with the place of each row."""

    name: str
    split: str
    values: pa.Array
    names: tuple[str, ...] | None
    """Class names of a ``ClassLabel`` feature (of the items of a list column)."""
    table: pa.Table
    """The column as it was read, with ``_file`` and ``_line`` where they are known."""

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        """Raises DataError at a row of this column."""
        if position is None or not {"_file", "_line"} <= {*self.table.column_names}:
            raise DataError(message, column=self.name)
        file, line = (self.table[name][position].as_py() for name in ("_file", "_line"))
        raise DataError(message, file=file, line=line, column=self.name)

    @property
    def is_list(self) -> bool:
        """Whether a row holds several labels."""
        return _is_list(self.values.type)

    @property
    def is_text(self) -> bool:
        """Whether a row holds text."""
        return str(self.values.type) in ("string", "large_string")

    @property
    def shape(self) -> str:
        """What a row holds, for messages: lists, words or numbers."""
        if self.is_list:
            return "lists"
        return "words" if self.is_text and not self.kinds() <= {*NUMERIC, "missing"} else "numbers"

    def kinds(self) -> set[spelling.Kind]:
        """Kinds of the different labels."""
        return {spelling.kind_of(value) for value in self.distinct()}

    def refuse_nulls(self) -> None:
        """Raises DataError at the first row without a label (null, not-a-number, or -1 of a ``ClassLabel``)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        missing = pc.is_null(self.values, nan_is_null=pa.types.is_floating(self.values.type))
        if self.is_list and self._flat().null_count:
            self.fail("no label inside a list of labels; take the null out", self.first(None))
        if self.is_text:
            missing = pc.or_(missing, pc.equal(pc.fill_null(pc.utf8_trim_whitespace(self.values), ""), ""))
        if self.names is not None and pa.types.is_integer(self.values.type):
            missing = pc.or_(missing, pc.fill_null(pc.less(self.values, 0), True))
        position = pc.index(missing, True).as_py()
        if position >= 0:
            rows = f"{pc.sum(missing).as_py():,} of {len(self.values):,} rows of the {self.split} split"
            hint = (
                "fill or drop them (a blank is not read as 0 or as a class), or choose another split with data.splits"
            )
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

    def first_of_kind(self, kind: spelling.Kind) -> int:
        """Index of the first row with a label of this kind."""
        return self.first(next(value for value in self.distinct() if spelling.kind_of(value) == kind))

    def with_lists(self, read: Callable[[str], list[Any] | None]) -> LabelColumn:
        """The column with each text read as a list of labels; raises DataError at one that is none."""
        import pyarrow as pa

        encoded = self.values.dictionary_encode()
        lists = []
        for text in encoded.dictionary.to_pylist():
            labels = read(text)
            if labels is None:
                self.fail(f"expected a list of labels as in other rows, found {shorten(text)}", self.first(text))
            lists.append(labels)
        try:
            values = pa.array(lists).take(encoded.indices)
        except (pa.ArrowException, OverflowError) as error:
            mixed = f"lists of labels of mixed kinds: {str(error).splitlines()[0]}"
            self.fail(f"{mixed}. Write all labels one way, such as {shorten(encoded.dictionary[0].as_py())}")
        column = replace(self, values=values)
        column.refuse_other_types()
        column.refuse_nulls()
        return column

    def lengths(self) -> np.ndarray:
        """Labels of each row of a column of lists."""
        import pyarrow.compute as pc

        return pc.list_value_length(self.values).to_numpy(zero_copy_only=False)

    def indicators(self) -> np.ndarray:
        """One-hot lists as 0 and 1, [rows, classes]."""
        import numpy as np

        flat = np.array([spelling.indicator(value) for value in self._flat().to_pylist()], dtype=np.int64)
        return flat.reshape(len(self.values), -1)

    def refuse_other_types(self) -> None:
        """Raises DataError unless labels are words, numbers, booleans or lists of them."""
        import pyarrow.types as types

        kind = self.values.type
        of_labels = (
            types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean,
            types.is_null,
        )  # fmt: skip
        if any(check(kind.value_type if self.is_list else kind) for check in of_labels):
            return
        shown = next((shorten(value) for value in self._flat().slice(0, 100).to_pylist() if value is not None), "")
        what = "objects" if types.is_struct(kind) or types.is_map(kind) else f"values of type {kind}"
        expected = "expected a word, a number or a list of them as label"
        hint = "write the label into a column of its own, as text, and name that in data.label"
        self.fail(f"{expected}, found {what} such as {shown}; {hint}", 0)

    def _flat(self) -> pa.Array:
        import pyarrow.compute as pc

        return pc.list_flatten(self.values) if self.is_list else self.values


def read_column(split: str, dataset: Any, name: str, data: DataConfig) -> LabelColumn:
    """The column ``name`` of a ``datasets.Dataset``; raises DataError when there is none, or a row has no label.

    With ``data.cleaning.null_words=drop``, the rows that cleaning will drop are left out.
    """
    import pyarrow as pa

    drop = data.cleaning.null_words == "drop"
    labels = data.label_columns if drop else (name,)
    for label in labels:
        require_column(dataset, label, "data.label")
    places = [column for column in ("_file", "_line") if column in dataset.column_names]
    table = dataset.select_columns([*labels, *places]).with_format("arrow")[:]
    if drop:
        table = without_null_words(table, labels, data.label_separator)
    feature = dataset.features[name]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    values = table.column(name).combine_chunks()
    item = values.type.value_type if _is_list(values.type) else values.type
    if pa.types.is_decimal(item):
        values = values.cast(pa.list_(pa.float64()) if item is not values.type else pa.float64())
    column = LabelColumn(name, split, values, tuple(names) if names else None, table)
    column.refuse_other_types()
    column.refuse_nulls()
    return column


def refuse_mixed(column: LabelColumn) -> None:
    """Raises DataError when some labels are numbers and others words, which a shifted column or a header often is."""
    values = column.distinct()
    numbers = [value for value in values if spelling.kind_of(value) in NUMERIC]
    words = [value for value in values if spelling.kind_of(value) not in NUMERIC]
    if not numbers or not words or all(spelling.kind_of(value) == "code" for value in words):
        return
    counts = column.counts()
    rare = min(numbers, words, key=lambda group: sum(counts[value] for value in group))
    kinds = f"numbers ({_different(numbers)}) and words ({_different(words)})"
    be = "is" if len(rare) == 1 else "are"
    shown = f"the rarer {be} {', '.join(map(repr, rare[:3]))}, here first"
    hint = "Write them one way, or list all of them in data.labels"
    if len(numbers) > MOST_LEVELS:
        hint = "Where the number is to be predicted (task.problem_type=regression), fill or remove rows without one"
    if all(is_null_word(value) for value in words):
        rows = sum(counts[value] for value in words)
        hint = f"data.cleaning.null_words=drop leaves out rows with only a word for a missing label ({rows:,} here)"
    column.fail(f"labels of mixed kinds: {kinds}; {shown}. {hint}", column.first(rare[0]))


def _different(values: Sequence[Any]) -> str:
    return f"{len(values)} different" if len(values) > 1 else repr(values[0])


def reads_as_number(column: LabelColumn) -> bool:
    """Whether the labels of a column are numbers to be predicted; raises DataError where only the user knows."""
    kinds = column.kinds() - {"missing"}
    if "formatted" in kinds and kinds <= {*NUMERIC}:
        example = next(value for value in column.distinct() if spelling.kind_of(value) == "formatted")
        lists = "; if it is a list of labels, set data.label_separator=','" if "," in example else ""
        column.fail(
            f"{shorten(example)} may be a number in local format or the name of a class: set "
            f"task.problem_type=regression to predict the number (a decimal comma is read; thousands separators and "
            f"percent signs have to go), or {AS_CLASSES} to keep the text as a class{lists}",
            column.first(example),
        )
    values = column.distinct()
    if "decimal" not in kinds or not kinds <= {"whole", "decimal"} or spelling.are_versions(values):
        return False
    if len(values) <= MOST_LEVELS and len(column.values) >= 2 * len(values):
        shown = ", ".join(str(value) for value in sorted(values, key=float)[:6])
        decimals = "1 decimal" if len(values) == 1 else f"{len(values)} different decimals"
        few = f"{decimals} in {len(column.values):,} rows ({shown}{', …' * (len(values) > 6)})"
        message = f"{few}: set task.problem_type=regression to predict the number, or {AS_CLASSES} for a class each"
        column.fail(message, column.first_of_kind("decimal"))
    return True


def refuse_joined(column: LabelColumn) -> None:
    """Raises DataError when cells look like several labels with a separator between them."""
    for separator in spelling.SEPARATORS if column.is_text else ():
        joined = _joined(column.distinct(), separator)
        if joined:
            counts = column.counts()
            rows = sum(counts[value] for value in joined)
            column.fail(
                f"{shorten(joined[0])} looks like several labels, as {rows:,} of {len(column.values):,} rows do: set "
                f"data.label_separator='{separator}' to learn each of them, or {AS_CLASSES} to keep every text as one "
                "class",
                column.first(joined[0]),
            )


def _joined(values: Collection[str], separator: str) -> list[str]:
    """The texts that a separator divides into labels of which one also occurs in another text."""
    pieces = {value: spelling.split_labels(value, separator) for value in values}
    texts = Counter(piece for parts in pieces.values() for piece in {*parts})
    joined = [value for value, parts in pieces.items() if len(parts) > 1 and any(texts[piece] > 1 for piece in parts)]
    # prose has commas too: labels are few, and so recur
    return joined if separator != "," or len(texts) <= len(pieces) + 1 else []


def lists_of(columns: Sequence[LabelColumn], separator: str | None) -> list[LabelColumn]:
    """Text columns as columns of lists where a separator is given, or where they spell lists; else as they are."""
    if not any(column.is_text for column in columns):
        if separator is not None:
            columns[0].fail(
                f"data.label_separator={separator!r} divides texts, and this column holds none; leave it out"
            )
        return [*columns]
    if separator is not None:
        read = partial(spelling.split_labels, separator=separator)
        return [column.with_lists(read) if column.is_text else column for column in columns]
    if any("list" in column.kinds() for column in columns if column.is_text):
        return [column.with_lists(_spelled_list) if column.is_text else column for column in columns]
    for column in columns:
        if column.is_text and "object" in column.kinds():
            text = column.distinct()[0]
            hint = "write the label into a column of its own, as text, and name that in data.label"
            column.fail(
                f"expected a label, found an object such as {shorten(text)}; {hint}", column.first_of_kind("object")
            )
    return [*columns]


def _spelled_list(text: str) -> list[Any] | None:
    parsed = spelling.parse(text)
    return parsed if isinstance(parsed, list) else None


def are_one_hot(columns: Sequence[LabelColumn], known: int | None, *, trained: Integers | None = None) -> bool:
    """Whether lists hold a 0 or 1 for each class by place, and not names or ids; raises DataError where neither fits.

    A list of ids has each once: three or more of 0 and 1 can only be places, as can two where a row is [0, 0] or
    [1, 1], or where no row is anything but [0, 1] and [1, 0].

    Args:
        known: number of classes, where the recipe, the source or the trained run names them.
        trained: how a trained run reads lists, when further rows are read for it.
    """
    import numpy as np

    values = [value for column in columns for value in column.distinct()]
    kinds = {spelling.kind_of(value) for value in values}
    if "decimal" in kinds and kinds <= {"whole", "decimal"}:
        column = next(column for column in columns if "decimal" in column.kinds())
        hint = "write a list of names, of whole numbers, or of one 0 or 1 for each class"
        column.fail(f"a share of a label cannot be learned; {hint}", column.first_of_kind("decimal"))
    if not values or kinds not in ({"flag"}, {"whole"}) or any(spelling.indicator(value) is None for value in values):
        return False
    lengths = [(column, column.lengths()) for column in columns]
    widths = sorted({int(length) for _, each in lengths for length in np.unique(each)})
    what = "lists of True and False" if kinds == {"flag"} else "lists of 0 and 1"
    if len(widths) > 1:
        if kinds == {"whole"} and widths[-1] <= 2:
            return False  # ids: [], [0], [0, 1]
        column, each = next(pair for pair in lengths if (pair[1] != widths[-1]).any())
        message = f"{what} of different lengths ({', '.join(map(str, widths[:5]))}): one for each class is expected"
        column.fail(message, int(np.argmax(each != widths[-1])))
    width = widths[0]
    proved = width > 2 or kinds == {"flag"}
    proved = proved or (width == 2 and any((column.indicators().sum(axis=1) != 1).any() for column in columns))
    if known is None and width == 1 and not proved:
        hint = "write the value without the list, or name the classes in data.labels"
        columns[0].fail(f"a list of one 0 or 1 may be an id or say whether a label holds; {hint}", 0)
    if known is not None and known != width:
        if proved:
            columns[0].fail(f"{what} of length {width} for {known} labels: one for each label is expected", 0)
        return False
    return proved or (width > 1 and trained in (None, "one_hot"))


@dataclass(frozen=True)
class ClassReader:
    """Which class a label of the source stands for."""

    labels: tuple[str, ...]
    integers: Integers = "names"
    """What a whole number is; see ``TaskInfo``."""
    merge: bool = False
    """Whether labels that differ in case, spacing or Unicode form are one."""

    def id(self, value: Any) -> int | None:
        """The id of a label, or None when it is not among ``labels``."""
        whole = spelling.whole_number(value)
        is_id = self.integers == "ids" and whole is not None and 0 <= whole < len(self.labels)
        if is_id and not isinstance(value, str):
            return whole
        names = _ids(self.labels)
        for name in (spelling.text_of(value), spelling.name_of(value)):
            if name in names:
                return names[name]
        if is_id:
            return whole
        return _folded(self.labels).get(spelling.fold(spelling.text_of(value))) if self.merge else None

    def knows(self, values: Sequence[Any]) -> bool:
        """Whether all of the labels are known."""
        return all(self.id(value) is not None for value in values)

    def split(self, text: str) -> list[str] | None:
        """The known labels that a text joins by one of the usual separators, or None where they are not all known."""
        divided = (spelling.split_labels(text, separator) for separator in spelling.SEPARATORS if separator in text)
        return next((labels for labels in divided if labels and self.knows(labels)), None)


@lru_cache(maxsize=64)
def _ids(labels: tuple[str, ...]) -> dict[str, int]:
    return {name: position for position, name in enumerate(labels)}


@lru_cache(maxsize=64)
def _folded(labels: tuple[str, ...]) -> dict[str, int]:
    return {spelling.fold(name): position for position, name in enumerate(labels)}


def merged_names(column: LabelColumn, names: tuple[str, ...]) -> tuple[str, ...]:
    """The commonest of the names that differ in case, spacing or Unicode form only."""
    rows = Counter[str]()
    reader = ClassReader(names)
    for value, count in column.counts().items():
        position = reader.id(value)
        assert position is not None, value
        rows[names[position]] += count
    kept: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (-rows[name], name)):
        kept.setdefault(spelling.fold(name), name)
    return tuple(name for name in names if kept[spelling.fold(name)] == name)


def reading_of_integers(columns: Sequence[LabelColumn], labels: tuple[str, ...]) -> Literal["names", "ids"]:
    """Whether whole numbers in the columns are class ids or class names, judged over all splits.

    Numbers that all stand in ``labels`` are names; otherwise they are ids. A ``ClassLabel`` feature holds ids.
    """
    if any(column.names is not None for column in columns):
        return "ids"
    values = [value for column in columns for value in column.distinct()]
    whole = [value for value in values if spelling.whole_number(value) is not None]
    return "names" if ClassReader(labels).knows(whole) else "ids"


PINNED = "data.labels=null takes the labels from the source"


def check_known(column: LabelColumn, reader: ClassReader, hint: str | None) -> None:
    """Raises DataError at the first row whose label is not among the labels.

    ``hint`` is what to do where recipe, source or run give the labels; None where they are those of training.
    """
    labels = reader.labels
    for value in column.distinct():
        if reader.id(value) is not None:
            continue
        near = did_you_mean(spelling.text_of(value), labels)
        message = f"does not occur in training: {near} List it in data.labels if it is meant"
        if hint is not None:
            ids = f" (or ids 0 to {len(labels) - 1})" if reader.integers == "ids" else ""
            if isinstance(value, str) and reader.split(value):
                separator = next(mark for mark in spelling.SEPARATORS if mark in value)
                hint = f"for several labels per row set data.label_separator='{separator}'"
            joint = " " if near.endswith("?") else "; "
            message = f"is not among the {len(labels)} labels given{ids}: {near}{joint}{hint}".rstrip("; ")
        column.fail(f"label {value!r} of the {column.split} split {message}", column.first(value))


def refuse_too_many(column: LabelColumn, classes: int) -> None:
    """Raises DataError when a label column looks like free text or measurements."""
    rows = len(column.values)
    if classes >= MANY_CLASSES and classes * 2 > rows and not column.is_list:
        shown = f"{classes:,} different labels in {rows:,} rows, such as {str(column.values[0])[:60]!r}"
        hint = "Is data.label the right column? For numbers to be predicted set task.problem_type=regression"
        column.fail(f"{shown}: these are not classes. {hint}")


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
