"""Text classification: one label of several, several labels at once, or a number (regression).

    task: {kind: classification, label_smoothing: 0.1, class_weights: balanced}

Each of the three has a head of its own in ``peftkit.heads``, with its loss and its metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.errors import DataError, RecipeError, did_you_mean
from peftkit.schema.head import head_of
from peftkit.schema.registries import TASKS
from peftkit.schema.task import Task
from peftkit.schema.types import Row, TaskInfo
from peftkit.tasks import label_column as reading
from peftkit.tasks.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@TASKS.register("classification")
class Classification(Task):
    """Predicts the label, labels or number of a text or a pair of texts."""

    heads: ClassVar[tuple[str, ...]] = (SINGLE, MULTI, REGRESSION)

    kind: Literal["classification"] = "classification"
    problem_type: Literal["auto", "single_label_classification", "multi_label_classification", "regression"] = "auto"
    """auto: several label columns or a list per row are multi-label; fractions are a regression."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread evenly over the classes (Szegedy et al. 2016); for one label per row."""
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Loss weight of each class: balanced is rows ÷ (classes × rows of the class); a mapping sets some, the others are
    1. With several labels per row they weight the positives; balanced is then negatives ÷ positives."""
    cosine_temperature: Annotated[float, Field(gt=0)] | None = None
    """Trains the head on cosines ÷ this, starting from the class means of up to 256 training rows: 0.1 for a few rows
    per class. None trains it on dot products from a random start."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability from which a label is predicted, where a row may have several."""

    def head_options(self, info: TaskInfo) -> dict[str, Any]:
        """Label smoothing and cosines where a row has one label, the threshold where it may have several."""
        options = {SINGLE: ("label_smoothing", "cosine_temperature"), MULTI: ("threshold",)}
        return {name: getattr(self, name) for name in options.get(info.problem_type, ())}

    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Problem type, class names and class weights from the raw splits; checks every label of every split."""
        self._check_texts(splits, data)
        if not isinstance(data.label, str) and len(data.label) > 1:
            return self._describe_indicators(splits, data)
        name = data.label if isinstance(data.label, str) else data.label[0]
        columns = [reading.read_column(split, rows, name) for split, rows in splits.items()]
        for column in columns:
            column.refuse_nulls()
        _refuse_differing(columns)
        train = _training(columns)
        problem = self._problem_of(train, data)
        if problem == REGRESSION:
            return self._describe_regression(columns)
        if problem == MULTI and not train.is_list:
            train.fail(
                "task.problem_type=multi_label_classification needs a list of labels in each row, or several 0/1 "
                "columns named in data.label; this column holds one value per row"
            )
        if problem == SINGLE and train.is_list:
            train.fail("this column holds a list in each row; set task.problem_type=multi_label_classification")
        return self._describe_classes(columns, problem, data)

    def _problem_of(self, train: reading.LabelColumn, data: DataConfig) -> str:
        if self.problem_type != "auto":
            return self.problem_type
        if train.is_list:
            return MULTI
        if data.labels is None and train.names is None:
            values = train.distinct()
            numeric = all(reading.number(value) is not None for value in values)
            if numeric and any(reading.whole_number(value) is None for value in values):
                return REGRESSION
        return SINGLE

    def _describe_classes(self, columns: list[reading.LabelColumn], problem: str, data: DataConfig) -> TaskInfo:
        train = _training(columns)
        labels = data.labels or train.names
        if labels is None:
            reading.refuse_mixed(train)
            labels = reading.sorted_names(train.distinct())
            reading.refuse_too_many(train, len(labels))
        if len(set(labels)) != len(labels):
            raise DataError(f"data.labels names a label twice: {', '.join(labels)}", column=train.name)
        integers = reading.reading_of_integers(columns, labels)
        for column in columns:
            reading.check_known(column, labels, integers, given=data.labels is not None or train.names is not None)
        counts = _count_ids(train, labels, integers)
        if sum(count > 0 for count in counts) < 2 and problem == SINGLE:
            _fail_one_class(train)
        if data.labels is None:
            _refuse_unseen(columns, labels, integers, counts)
        return TaskInfo(problem, labels, self._weights(labels, counts, len(train.values), problem), integers)

    def _describe_indicators(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        if self.problem_type not in ("auto", MULTI):
            raise RecipeError(
                f"task.problem_type={self.problem_type} reads one column, but data.label names {len(data.label)}"
            )
        if data.labels is not None and len(data.labels) != len(data.label):
            raise RecipeError(f"data.labels has {len(data.labels)} names for {len(data.label)} columns of data.label")
        counts = []
        for split, rows in splits.items():
            for name in data.label:
                column = reading.read_column(split, rows, name)
                column.refuse_nulls()
                positives = _count_positives(column)
                if split == _training_split(splits):
                    counts.append(positives)
        labels = tuple(data.labels or data.label)
        rows = len(splits[_training_split(splits)])
        return TaskInfo(MULTI, labels, self._weights(labels, counts, rows, MULTI))

    def _describe_regression(self, columns: list[reading.LabelColumn]) -> TaskInfo:
        for field in ("class_weights", "label_smoothing", "cosine_temperature"):
            if getattr(self, field) != type(self).model_fields[field].default:
                raise RecipeError(f"task.{field} needs classes, and this is a regression; leave it out")
        for column in columns:
            if column.is_list:
                column.fail("a regression learns one number per row; this column holds a list in each row", 0)
            for value in column.distinct():
                if reading.number(value) is None:
                    column.fail(f"expected a finite number for a regression, found {value!r}", column.first(value))
        if len(_training(columns).distinct()) < 2:
            _fail_one_class(_training(columns))
        return TaskInfo(REGRESSION, (columns[0].name,))

    def _weights(
        self, labels: tuple[str, ...], counts: Sequence[int], rows: int, problem: str
    ) -> tuple[float, ...] | None:
        if problem == MULTI and (self.label_smoothing or self.cosine_temperature):
            field = "label_smoothing" if self.label_smoothing else "cosine_temperature"
            raise RecipeError(f"task.{field} works where a row has one label; leave it out")
        if self.class_weights is None:
            return None
        if isinstance(self.class_weights, dict):
            for name in self.class_weights:
                if name not in labels:
                    raise RecipeError(f"task.class_weights names no label '{name}': {did_you_mean(name, labels)}")
            return tuple(float(self.class_weights.get(name, 1.0)) for name in labels)
        if problem == MULTI:
            return tuple((rows - count) / count if 0 < count < rows else 1.0 for count in counts)
        present = sum(count > 0 for count in counts)
        return tuple(sum(counts) / (present * count) if count else 1.0 for count in counts)

    @classmethod
    def example_info(cls, *, decoder: bool) -> TaskInfo | None:
        """Two classes on an encoder."""
        return None if decoder else TaskInfo(SINGLE, ("a", "b"))

    def _check_texts(self, splits: Mapping[str, Any], data: DataConfig) -> None:
        for split, rows in splits.items():
            for field, name in (("text", data.text), ("text_pair", data.text_pair)):
                if name is None:
                    continue
                reading.require_column(split, rows, name)
                if not _is_text(rows.features[name]):
                    words = [other for other in rows.column_names if other[0] != "_" and _is_text(rows.features[other])]
                    hint = f"; columns of text: {', '.join(words)}" if words else ""
                    dtype = getattr(rows.features[name], "dtype", rows.features[name])
                    message = f"data.{field} must name a column of text, found {dtype}{hint}"
                    raise DataError(message, column=name)

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """``text``, ``text_pair`` where the recipe names one, and ``label``: an id, a list of 0.0/1.0, or a number."""
        canonical: Row = {"text": _text(row, data.text)}
        if data.text_pair is not None:
            canonical["text_pair"] = _text(row, data.text_pair)
        canonical["label"] = self._label(row, data, info)
        return {**canonical, **{name: row[name] for name in ("_file", "_line") if name in row}}

    def _label(self, row: Row, data: DataConfig, info: TaskInfo) -> int | float | list[float]:
        names = (data.label,) if isinstance(data.label, str) else data.label
        if len(names) > 1:
            return [_indicator(row, name) for name in names]
        value = _cell(row, names[0])
        if info.problem_type == REGRESSION:
            number = reading.number(value)
            if number is None:
                raise _bad(row, names[0], f"expected a finite number, found {value!r}")
            return number
        if info.problem_type == MULTI:
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise _bad(row, names[0], f"expected a list of labels, found {value!r}")
            given = {self._class(row, names[0], item, info) for item in value}
            return [float(position in given) for position in range(len(info.labels))]
        return self._class(row, names[0], value, info)

    def _class(self, row: Row, column: str, value: Any, info: TaskInfo) -> int:
        if value is None:
            raise _bad(row, column, "no label")
        position = reading.class_id(value, info.labels, info.integers)
        if position is None:
            raise _bad(row, column, f"unknown label {value!r}: {did_you_mean(reading.name_of(value), info.labels)}")
        return position

    def input_columns(self, data: DataConfig) -> tuple[str, ...]:
        """The text, and its pair."""
        return (data.text,) if data.text_pair is None else (data.text, data.text_pair)

    def input_row(self, values: Sequence[str]) -> Row:
        """``text``, and ``text_pair`` where there are two."""
        return dict(zip(("text", "text_pair"), values))

    def is_blank(self, row: Row) -> bool:
        """Whether the text or its pair is blank."""
        return not all(str(row[name]).strip() for name in ("text", "text_pair") if row.get(name) is not None)

    def text_of(self, row: Row) -> str:
        """The text, with its pair under it."""
        return f"{row['text']}\n{row['text_pair']}" if "text_pair" in row else row["text"]

    def stratum(self, row: Row) -> str:
        """The class, or the combination of labels; regressions have none."""
        label = row["label"]
        if isinstance(label, list):
            return "".join("1" if value else "0" for value in label)
        return str(label) if isinstance(label, int) else ""

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """Tokenizes a batch of rows; rows without a ``label`` (texts to be predicted) get weight 0.

        ``truncated`` is exact: every row is tokenized whole, and only those over the limit once more with truncation,
        so that special tokens stay and pairs are cut as the tokenizer does it.
        """
        texts = list(rows["text"])
        pairs = list(rows["text_pair"]) if "text_pair" in rows else None
        encoded, truncated = tokenize(texts, pairs, tokenizer, min(data.max_length, tokenizer.model_max_length))
        head: Any = head_of(info, self)  # one of ``heads``, all of them classifiers
        labels = list(rows["label"]) if "label" in rows else [head.blank_label()] * len(texts)
        columns: dict[str, list[Any]] = {"input_ids": encoded["input_ids"]}
        if "token_type_ids" in encoded and (pairs is not None or any(tokenizer("a")["token_type_ids"])):
            columns["token_type_ids"] = encoded["token_type_ids"]
        weights = [0.0] * len(texts) if "label" not in rows else [head.weight(label) for label in labels]
        return {**columns, "labels": labels, "weight": weights, "row": list(range(len(texts))), "truncated": truncated}


def _training_split(splits: Mapping[str, Any]) -> str:
    return "train" if "train" in splits else next(iter(splits))


def _training(columns: list[reading.LabelColumn]) -> reading.LabelColumn:
    return next((column for column in columns if column.split == "train"), columns[0])


def _refuse_differing(columns: list[reading.LabelColumn]) -> None:
    """Raises DataError when one split's labels are numbers and another's words or lists."""

    def shape(column: reading.LabelColumn) -> str:
        return "lists" if column.is_list else "words" if column.is_words else "numbers"

    train = _training(columns)
    for column in columns:
        if shape(column) != shape(train) and len(column.values):
            column.fail(
                f"labels are {shape(column)} in the {column.split} split and {shape(train)} in the {train.split} "
                "split; write them one way",
                0,
            )


def _count_ids(column: reading.LabelColumn, labels: tuple[str, ...], integers: str) -> list[int]:
    counts = [0] * len(labels)
    for value, count in column.counts().items():
        position = reading.class_id(value, labels, integers)
        assert position is not None, value
        counts[position] += count
    return counts


def _refuse_unseen(
    columns: list[reading.LabelColumn], labels: tuple[str, ...], integers: str, counts: Sequence[int]
) -> None:
    """Raises DataError when another split has a class that no training row has, unless data.labels lists it."""
    for column in columns:
        for value in column.distinct():
            position = reading.class_id(value, labels, integers)
            if position is not None and not counts[position]:
                column.fail(
                    f"label '{labels[position]}' of the {column.split} split has no row in training, so it cannot be "
                    "learned; add some, or list the names in data.labels to train anyway",
                    column.first(value),
                )


def _fail_one_class(column: reading.LabelColumn) -> None:
    only = column.distinct()[0] if len(column.values) else None
    shown = column.names[only] if column.names and isinstance(only, int) else only
    column.fail(
        f"all {len(column.values):,} rows of the {column.split} split have the label {shown!r}; a classifier needs at "
        "least two classes. Is the file sorted and cut short, or data.label the wrong column?"
    )


def _count_positives(column: reading.LabelColumn) -> int:
    positives = 0
    for value, count in column.counts().items():
        flag = reading.whole_number(int(value) if isinstance(value, bool) else value)
        if flag not in (0, 1):
            column.fail(f"a column of a multi-label task holds 0 or 1, found {value!r}", column.first(value))
        positives += count * flag
    return positives


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in {"string", "large_string", "null"}


def _bad(row: Row, column: str, message: str) -> DataError:
    return DataError(message, file=row.get("_file"), line=row.get("_line"), column=column)


def _cell(row: Row, column: str) -> Any:
    if column not in row:
        names = [name for name in row if not name.startswith("_")]
        raise DataError(f"no column '{column}': {did_you_mean(column, names)}", file=row.get("_file"))
    return row[column]


def _text(row: Row, column: str) -> str:
    value = _cell(row, column)
    if value is not None and not isinstance(value, str):
        raise _bad(row, column, f"expected text, found {value!r}")
    return value or ""


def _indicator(row: Row, column: str) -> float:
    value = _cell(row, column)
    flag = reading.whole_number(int(value) if isinstance(value, bool) else value)
    if flag not in (0, 1):
        raise _bad(row, column, f"expected 0 or 1, found {value!r}")
    return float(flag)
