"""Text classification: one label of several, several labels at once, or a number (regression).

    task: {kind: classification, label_smoothing: 0.1, class_weights: balanced}

Each of the three has a head of its own in ``peftkit.heads``, with its loss and its metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.data.problems import require_column
from peftkit.errors import DataError, RecipeError, did_you_mean
from peftkit.schema.head import head_of
from peftkit.schema.registries import TASKS
from peftkit.schema.sections import ClassName
from peftkit.schema.task import Task
from peftkit.schema.types import Row, TaskInfo
from peftkit.tasks import label_column as reading
from peftkit.tasks import label_review
from peftkit.tasks.control_tokens import warn_of_control_tokens
from peftkit.tasks.label_spelling import (
    class_names,
    indicator,
    name_of,
    number,
    parse,
    split_labels,
    text_of,
    whole_number,
)
from peftkit.tasks.null_words import has_null_word, is_null_word
from peftkit.tasks.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig

TEXT = ("string", "large_string", "null")
"""Arrow types of a column of text; null is that of one without any value."""
DROP_NULL_WORDS = "data.cleaning.null_words=drop leaves such rows out"
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@TASKS.register("classification")
class Classification(Task):
    """Predicts the label, labels or number of a text or a pair of texts."""

    heads: ClassVar[tuple[str, ...]] = (SINGLE, MULTI, REGRESSION)

    kind: Literal["classification"] = "classification"
    problem_type: Literal["auto", "single_label_classification", "multi_label_classification", "regression"] = "auto"
    """auto: several label columns, lists or data.label_separator are multi-label; many different decimals are a
    regression; words, codes and whole numbers are one class per row. What could be read in two ways is asked about."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread evenly over the classes (Szegedy et al. 2016); for one label per row."""
    class_weights: Literal["balanced"] | dict[ClassName, Annotated[float, Field(gt=0)]] | None = None
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
        columns = _columns(splits, data)
        if len(data.label_columns) > 1:
            return self._describe_indicators(columns, data)
        columns = self._with_lists(columns, data)
        _refuse_differing(columns)
        train = _training(columns)
        problem = self._problem_of(train, data)
        if problem == REGRESSION:
            return self._describe_regression(columns)
        if problem == MULTI and not train.is_list:
            needs = "needs a list of labels in each row, data.label_separator, or several 0/1 columns in data.label"
            train.fail(f"task.problem_type={MULTI} {needs}; this column holds one value per row")
        if problem == SINGLE and train.is_list:
            train.fail(f"this column holds a list in each row; set task.problem_type={MULTI}")
        return self._describe_classes(columns, problem, data)

    def describe_file(self, splits: Mapping[str, Any], data: DataConfig, info: TaskInfo) -> TaskInfo:
        """``info`` with the file's own reading of whole numbers; its labels must be known, but need not all occur."""
        self._check_texts(splits, data)
        columns = _columns(splits, data)
        if len(data.label_columns) > 1:
            for column in columns:
                _count_positives(column)
            return info
        if info.problem_type == REGRESSION:
            _check_numbers(columns)
            return info
        if info.problem_type == MULTI:
            texts = [column for column in columns if column.is_text]
            if texts and (data.label_separator or any("list" in column.kinds() for column in texts)):
                columns = reading.lists_of(columns, data.label_separator)
            else:
                columns = [column for column in columns if not column.is_text]  # ``canonical`` divides and checks each
            info = replace(info, integers=_integers_of_lists(columns, info))
        if info.integers != "one_hot":
            for column in columns:
                reading.check_known(column, _reader(data, info), "the run knows no others")
        return info

    def _with_lists(self, columns: list[reading.LabelColumn], data: DataConfig) -> list[reading.LabelColumn]:
        separator = data.label_separator
        if separator is not None and self.problem_type not in ("auto", MULTI):
            message = f"data.label_separator={separator!r} makes several labels per row"
            raise RecipeError(f"{message}, but task.problem_type={self.problem_type} has one; leave one of them out")
        train = _training(columns)
        if separator is not None and train.is_text and not any(separator in text for text in train.distinct()):
            train.fail(f"no label of the {train.split} split has a {separator!r} (data.label_separator) in it")
        return reading.lists_of(columns, separator) if self.problem_type in ("auto", MULTI) else columns

    def _problem_of(self, train: reading.LabelColumn, data: DataConfig) -> str:
        if self.problem_type != "auto":
            return self.problem_type
        if train.is_list:
            return MULTI
        if data.labels is None and train.names is None:
            if reading.reads_as_number(train):
                return REGRESSION
            reading.refuse_joined(train)
        return SINGLE

    def _describe_classes(self, columns: list[reading.LabelColumn], problem: str, data: DataConfig) -> TaskInfo:
        train = _training(columns)
        labels, merge = data.labels or train.names, data.cleaning.similar_classes == "merge"
        if train.is_list and reading.are_one_hot(columns, len(labels) if labels else None):
            return self._describe_one_hot(columns, data)
        hint = None if labels is None else "" if data.labels is None else reading.PINNED
        if labels is None:
            reading.refuse_mixed(train)
            labels = class_names(train.distinct())
            labels = reading.merged_names(train, labels) if merge else labels
            reading.refuse_too_many(train, len(labels))
        if len(set(labels)) != len(labels):
            raise DataError(f"data.labels names a label twice: {', '.join(labels)}", column=train.name)
        reader = reading.ClassReader(labels, reading.reading_of_integers(columns, labels), merge)
        for column in columns:
            reading.check_known(column, reader, hint)
        counts = _count_ids(train, reader)
        if sum(count > 0 for count in counts) < 2 and problem == SINGLE:
            _fail_one_class(train)
        if data.labels is None:
            _refuse_unseen(columns, reader, counts)
        weights = self._weights(labels, counts, len(train.values), problem)
        return TaskInfo(problem, labels, weights, reader.integers)

    def _describe_one_hot(self, columns: list[reading.LabelColumn], data: DataConfig) -> TaskInfo:
        """Labels by place in lists of 0 and 1, named by ``data.labels``, the source or their number from 0."""
        train = _training(columns)
        counts = train.indicators().sum(axis=0).tolist()
        labels = data.labels or train.names or tuple(map(str, range(len(counts))))
        for column in columns if data.labels is None else ():
            unseen = (column.indicators()[:, [not count for count in counts]] > 0).any(axis=1)
            if unseen.any():
                hint = "add some, or list the names in data.labels to train anyway"
                message = f"a row of the {column.split} split has a label that no row of training has; {hint}"
                column.fail(message, int(unseen.argmax()))
        return TaskInfo(MULTI, labels, self._weights(labels, counts, len(train.values), MULTI), "one_hot")

    def _describe_indicators(self, columns: list[reading.LabelColumn], data: DataConfig) -> TaskInfo:
        if self.problem_type not in ("auto", MULTI):
            reads = f"task.problem_type={self.problem_type} reads one column"
            raise RecipeError(f"{reads}, but data.label names {len(data.label)}")
        if data.label_separator is not None:
            raise RecipeError(f"data.label_separator divides one column, but data.label names {len(data.label)}")
        if data.labels is not None and len(data.labels) != len(data.label):
            raise RecipeError(f"data.labels has {len(data.labels)} names for {len(data.label)} columns of data.label")
        train, positives = _training(columns), [(column.split, _count_positives(column)) for column in columns]
        counts = [count for split, count in positives if split == train.split]
        labels = data.labels or data.label_columns
        return TaskInfo(MULTI, labels, self._weights(labels, counts, len(train.values), MULTI))

    def _describe_regression(self, columns: list[reading.LabelColumn]) -> TaskInfo:
        for field in ("class_weights", "label_smoothing", "cosine_temperature"):
            if getattr(self, field) != type(self).model_fields[field].default:
                raise RecipeError(f"task.{field} needs classes, and this is a regression; leave it out")
        _check_numbers(columns)
        if len(_training(columns).distinct()) < 2:
            _fail_one_class(_training(columns))
        return TaskInfo(REGRESSION, (columns[0].name,))

    def _weights(self, labels: tuple[str, ...], counts: list[int], rows: int, problem: str) -> tuple[float, ...] | None:
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
        return None if decoder else TaskInfo(SINGLE, ("a", "b"))

    def _check_texts(self, splits: Mapping[str, Any], data: DataConfig) -> None:
        for rows in splits.values():
            for field, name in zip(("text", "text_pair"), self.input_columns(data)):
                require_column(rows, name, f"data.{field}")
                kinds = {column: getattr(feature, "dtype", feature) for column, feature in rows.features.items()}
                if kinds[name] not in TEXT:
                    words = [column for column, kind in kinds.items() if column[0] != "_" and kind in TEXT[:2]]
                    hint = f"; columns of text: {', '.join(words)}" if words else ""
                    message = f"data.{field} must name a column of text, found {_plain(kinds[name])}{hint}"
                    raise DataError(message, column=name)

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """``text``, ``text_pair`` where the recipe names one, and ``label``: an id, a list of 0.0/1.0, or a number."""
        texts = [_text(row, column) for column in self.input_columns(data)]
        return {**self.input_row(texts), "label": self._label(row, data, info)}

    def _label(self, row: Row, data: DataConfig, info: TaskInfo) -> int | float | list[float]:
        names = data.label_columns
        if len(names) > 1:
            return [float(_value(row, name, indicator, "0 or 1, true or false, yes or no")) for name in names]
        if info.problem_type == REGRESSION:
            return _value(row, names[0], number, "a finite number")
        if info.problem_type != MULTI:
            return _class(_cell(row, names[0]), names[0], _reader(data, info))
        listed = _listed(_cell(row, names[0]), names[0], data, info)
        if info.integers == "one_hot" and len(listed) == len(info.labels):
            flags = [indicator(item) for item in listed]
            if all(flag is not None for flag in flags):
                return [float(flag or 0) for flag in flags]
        given = {_class(item, names[0], _reader(data, info)) for item in listed}
        return [float(position in given) for position in range(len(info.labels))]

    def null_word(self, row: Row, data: DataConfig) -> str | None:
        texts = [name for name in self.input_columns(data) if is_null_word(row.get(name))]
        labels = [name for name in data.label_columns if has_null_word(row.get(name), data.label_separator)]
        return (*texts, *labels)[0] if texts or labels else None

    def remarks(self, row: Row, data: DataConfig, info: TaskInfo) -> Iterable[tuple[str, str]]:
        """similar_classes: which spelling of a class was read as which, where such classes are merged."""
        column = data.label_columns[0]
        merges = data.cleaning.similar_classes == "merge" and len(data.label_columns) == 1
        if not merges or info.problem_type == REGRESSION or info.integers == "one_hot":
            return
        reader = _reader(data, info)
        for label in [row[column]] if info.problem_type == SINGLE else _listed(row[column], column, data, info):
            name = info.labels[_class(label, column, reader)]
            if whole_number(label) is None and name not in (text_of(label), name_of(label)):
                yield "similar_classes", f"{text_of(label)!r} read as {name!r}"

    def review(self, strata: Mapping[str, Mapping[str, int]], info: TaskInfo) -> Iterable[label_review.Remark]:
        """Classes with like names, classes that a split lacks, and imbalance; nothing for a regression."""
        if info.problem_type == REGRESSION:
            return ()
        counts = {split: _class_counts(each, info) for split, each in strata.items()}
        return label_review.review(counts, weighted=self.class_weights is not None)

    def input_columns(self, data: DataConfig) -> tuple[str, ...]:
        return (data.text,) if data.text_pair is None else (data.text, data.text_pair)

    def input_row(self, values: Sequence[str]) -> Row:
        return dict(zip(("text", "text_pair"), values))

    def is_blank(self, row: Row) -> bool:
        return not all(str(row[name]).strip() for name in ("text", "text_pair") if row.get(name) is not None)

    def text_of(self, row: Row) -> str:
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
        if "label" in rows:
            warn_of_control_tokens(list(zip(texts, pairs)) if pairs else [(text,) for text in texts], rows, tokenizer)
        encoded, truncated = tokenize(texts, pairs, tokenizer, data.max_length)
        head: Any = head_of(info, self)  # one of ``heads``, all of them classifiers
        labels = list(rows["label"]) if "label" in rows else [head.blank_label()] * len(texts)
        columns: dict[str, list[Any]] = {"input_ids": encoded["input_ids"]}
        if "token_type_ids" in encoded and (pairs is not None or any(tokenizer("a")["token_type_ids"])):
            columns["token_type_ids"] = encoded["token_type_ids"]
        weights = [0.0] * len(texts) if "label" not in rows else [head.weight(label) for label in labels]
        return {**columns, "labels": labels, "weight": weights, "row": list(range(len(texts))), "truncated": truncated}


def _columns(splits: Mapping[str, Any], data: DataConfig) -> list[reading.LabelColumn]:
    return [
        reading.read_column(split, rows, name, data) for split, rows in splits.items() for name in data.label_columns
    ]


def _plain(kind: Any) -> str:
    """The type of a column in words."""
    text = str(kind)
    plain = {"bool": "true or false", "binary": "bytes", "timestamp": "dates", "date": "dates", "List": "lists",
             "int": "numbers", "uint": "numbers", "float": "numbers", "decimal": "numbers", "{": "objects"}  # fmt: skip
    return next((words for start, words in plain.items() if text.startswith(start)), text)


def _training(columns: list[reading.LabelColumn]) -> reading.LabelColumn:
    return next((column for column in columns if column.split == "train"), columns[0])


def _refuse_differing(columns: list[reading.LabelColumn]) -> None:
    """Raises DataError when one split's labels are numbers and another's words or lists."""
    train = _training(columns)
    for column in columns:
        if column.shape != train.shape and len(column.values):
            here, there = (f"{one.shape} in the {one.split} split" for one in (column, train))
            column.fail(f"labels are {here} and {there}; write them one way", 0)


def _reader(data: DataConfig, info: TaskInfo) -> reading.ClassReader:
    return reading.ClassReader(info.labels, info.integers, data.cleaning.similar_classes == "merge")


def _check_numbers(columns: list[reading.LabelColumn]) -> None:
    for column in columns:
        if column.is_list:
            column.fail("a regression learns one number per row; this column holds a list in each row", 0)
        for value in column.distinct():
            if number(value) is None:
                expected = "expected a finite number such as 1250.5 for a regression"
                hint = f"; {DROP_NULL_WORDS}" if is_null_word(value) else ""
                column.fail(f"{expected}, found {value!r}{hint}", column.first(value))


def _integers_of_lists(columns: Sequence[reading.LabelColumn], info: TaskInfo) -> reading.Integers:
    """How whole numbers in the lists of a file are read for a trained run; raises DataError where it knows none."""
    if not columns or not reading.are_one_hot(columns, len(info.labels), trained=info.integers):
        return "ids" if info.integers == "one_hot" else info.integers
    if info.integers == "names" and info.labels != tuple(map(str, range(len(info.labels)))):
        listed = ", ".join(info.labels[:6])
        columns[0].fail(f"lists of 0 and 1, but the run was trained on lists of names; write the names: {listed}", 0)
    return "one_hot"


def _listed(value: Any, column: str, data: DataConfig, info: TaskInfo) -> Sequence[Any]:
    """The labels of a cell: a list, a list spelled as text, or labels joined by the recipe's or a usual separator."""
    if isinstance(value, str):
        if data.label_separator is not None or isinstance(parse(value), list):
            return split_labels(value, data.label_separator or ",")
        reader = _reader(data, info)
        return [value] if reader.id(value) is not None else reader.split(value) or [value]
    if not isinstance(value, Sequence):
        raise DataError(f"expected a list of labels, found {value!r}", column=column)
    return value


def _count_ids(column: reading.LabelColumn, reader: reading.ClassReader) -> list[int]:
    counts = [0] * len(reader.labels)
    for value, count in column.counts().items():
        position = reader.id(value)
        assert position is not None, value
        counts[position] += count
    return counts


def _refuse_unseen(columns: list[reading.LabelColumn], reader: reading.ClassReader, counts: Sequence[int]) -> None:
    """Raises DataError when another split has a class that no training row has, unless data.labels lists it."""
    hint = "add some, or list the names in data.labels to train anyway"
    for column in columns:
        for value in column.distinct():
            position = reader.id(value)
            if position is not None and not counts[position]:
                label = f"label '{reader.labels[position]}' of the {column.split} split"
                column.fail(f"{label} has no row in training, so it cannot be learned; {hint}", column.first(value))


def _fail_one_class(column: reading.LabelColumn) -> None:
    only = column.distinct()[0] if len(column.values) else None
    shown = column.names[only] if column.names and isinstance(only, int) else only
    count = len(column.values)
    rows = f"all {count:,} rows of the {column.split} split have the label {shown!r}"
    if count == 1:
        rows = f"the {column.split} split has a single row"
    hint = "Is the file sorted and cut short, or data.label the wrong column?"
    column.fail(f"{rows}; a classifier needs at least two classes. {hint}")


def _count_positives(column: reading.LabelColumn) -> int:
    positives = 0
    for value, count in column.counts().items():
        flag = indicator(value)
        if flag is None:
            expected = f"a column of a multi-label task holds 0 or 1, found {value!r}"
            hint = DROP_NULL_WORDS if is_null_word(value) else "true and false, yes and no will do"
            column.fail(f"{expected}; {hint}", column.first(value))
        positives += count * flag
    return positives


def _class_counts(strata: Mapping[str, int], info: TaskInfo) -> dict[str, int]:
    """Rows of each class from the rows of each stratum, which ``Classification.stratum`` names."""
    counts = [0] * len(info.labels)
    for stratum, rows in strata.items():
        places = (
            [place for place, flag in enumerate(stratum) if flag == "1"]
            if info.problem_type == MULTI
            else [int(stratum)]
        )
        for place in places:
            counts[place] += rows
    return dict(zip(info.labels, counts))


def _class(value: Any, column: str, reader: reading.ClassReader) -> int:
    if value is None:
        raise DataError("no label", column=column)
    position = reader.id(value)
    if position is None:
        raise DataError(f"unknown label {value!r}: {did_you_mean(text_of(value), reader.labels)}", column=column)
    return position


def _cell(row: Row, column: str) -> Any:
    if column not in row:
        names = [name for name in row if not name.startswith("_")]
        raise DataError(f"no such column: {did_you_mean(column, names)}", column=column)
    return row[column]


def _text(row: Row, column: str) -> str:
    value = _cell(row, column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"expected text, found {value!r}", column=column)
    return value or ""


def _value(row: Row, column: str, read: Callable[[Any], float | None], expected: str) -> float:
    value = read(_cell(row, column))
    if value is None:
        raise DataError(f"expected {expected}, found {row[column]!r}", column=column)
    return value
