"""Similarity: sentence embeddings, so that texts that are alike have vectors that lie close.

    task: {kind: similarity}
    data: {source: pairs.csv, text: question, text_pair: answer}

pairs with a number         text, text_pair, label        loss cosent, or mse for scores from 0 to 1
pairs that belong together  text, text_pair               loss ranking, other rows' texts are the negatives
triplets                    … and task.negatives=[wrong]  the same, with negatives of the row's own
texts with a class          text, label                   loss contrastive, texts of a class belong together

Each text is a sequence of its own, unlike the pairs of a classifier, which are read together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from peftkit.data.problems import require_column, shorten
from peftkit.errors import DataError, RecipeError
from peftkit.schema.registries import TASKS
from peftkit.schema.task import Task
from peftkit.schema.types import Row, TaskInfo
from peftkit.tasks.classification import SINGLE, Classification
from peftkit.tasks.label_spelling import number
from peftkit.tasks.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig

SCORED, PAIRS, LABELED = "scored_pairs", "text_pairs", "labeled_texts"
LOSSES = {SCORED: ("cosent", "mse"), PAIRS: ("ranking",), LABELED: ("contrastive",)}
NAME_BITS = 60


@TASKS.register("similarity")
class Similarity(Task):
    """Learns vectors of texts: like texts lie close."""

    heads: ClassVar[tuple[str, ...]] = (SCORED, PAIRS, LABELED)
    joins_pair: ClassVar[bool] = False

    kind: Literal["similarity"] = "similarity"
    loss: Literal["auto", "cosent", "mse", "ranking", "contrastive"] = "auto"
    """cosent: the order of the scores; mse: cosines equal to scores from 0 to 1; ranking: find the other text of the
    pair among those of the batch; contrastive: find texts of the same class. auto goes by the columns: cosent for pairs
    with data.label, ranking for pairs without, contrastive for texts with data.label."""
    scale: Annotated[float, Field(gt=0)] = 20.0
    """What cosines are multiplied with in cosent, ranking and contrastive: the inverse of their temperature."""
    symmetric: bool = False
    """ranking: each second text is to find its first, too."""
    negatives: tuple[str, ...] = ()
    """ranking: columns with texts that do not belong to the first, though they may look so."""
    dimensions: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Matryoshka: the first so many dimensions of the vectors are to be good ones by themselves: [256, 128, 64]."""

    @model_validator(mode="after")
    def _fields_of_ranking(self) -> Similarity:
        for field in ("symmetric", "negatives"):
            if getattr(self, field) and self.loss not in ("auto", "ranking"):
                raise ValueError(f"task.{field} belongs to task.loss=ranking, found task.loss={self.loss}")
        return self

    def texts_per_row(self, data: DataConfig) -> int:
        return 1 if data.text_pair is None else 2 + len(self.negatives)

    def head_options(self, info: TaskInfo) -> dict[str, Any]:
        loss = LOSSES[info.problem_type][0] if self.loss == "auto" else self.loss
        return {"loss_name": loss, "scale": self.scale, "symmetric": self.symmetric, "dimensions": self.dimensions}

    # -- reading rows ----------------------------------------------------------------------------------------------

    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Which kind of rows these are, by their columns; for texts with a class, the classes.

        Raises:
            DataError: a missing column, or scores that are no numbers; RecipeError: fields that do not fit.
        """
        if data.augmentation is not None:
            raise RecipeError("data.augmentation would change what is alike; set data.augmentation=null")
        if len(data.label_columns) > 1:
            raise RecipeError("data.label: task.kind=similarity reads one column of scores or classes")
        for rows in splits.values():
            for column, field in self._text_columns(data):
                require_column(rows, column, field)
        train = splits["train"] if "train" in splits else next(iter(splits.values()))
        problem = self._kind_of_rows(train, data)
        if problem != PAIRS:
            for rows in splits.values():
                require_column(rows, data.label_columns[0], "data.label")
        if problem != LABELED:
            return TaskInfo(problem, data.label_columns if problem == SCORED else ())
        return replace(_classes().describe(splits, data), problem_type=LABELED, class_weights=None)

    def _kind_of_rows(self, train: Any, data: DataConfig) -> str:
        labels = data.label_columns[0] in train.column_names
        if self.loss != "auto":
            problem = next(name for name, losses in LOSSES.items() if self.loss in losses)
            if (problem == LABELED) != (data.text_pair is None):
                expected = "reads one text per row" if problem == LABELED else "reads pairs"
                raise RecipeError(f"task.loss={self.loss} {expected}; found data.text_pair={data.text_pair or 'null'}")
            return problem
        if data.text_pair is None:
            if not labels:
                raise RecipeError(
                    "task.kind=similarity needs pairs (set data.text_pair to the column of the second text) or texts "
                    f"with a class (data.label={data.label_columns[0]}, which is no column of the data)"
                )
            problem = LABELED
        else:
            problem = SCORED if labels and not self.negatives else PAIRS
        for field in ("symmetric", "negatives"):
            if getattr(self, field) and problem != PAIRS:
                raise RecipeError(
                    f"task.{field} belongs to task.loss=ranking, and these rows lead to {LOSSES[problem][0]}"
                )
        return problem

    def _text_columns(self, data: DataConfig) -> list[tuple[str, str]]:
        """(column, field that names it) of every text of a row."""
        pair = [(data.text_pair, "data.text_pair")] if data.text_pair is not None else []
        return [(data.text, "data.text"), *pair, *((name, "task.negatives") for name in self.negatives)]

    def describe_file(self, splits: Mapping[str, Any], data: DataConfig, info: TaskInfo) -> TaskInfo:
        """``info``; raises DataError where a column is missing or a class is unknown."""
        for rows in splits.values():
            for column, field in self._text_columns(data):
                require_column(rows, column, field)
            if info.problem_type != PAIRS:
                require_column(rows, data.label_columns[0], "data.label")
        if info.problem_type == LABELED:
            _classes().describe_file(splits, data, replace(info, problem_type=SINGLE))
        return info

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """``text``, ``text_pair`` where there are pairs, ``negatives``, and ``label``: a score or a class id."""
        texts = [_text(row, column) for column, _ in self._text_columns(data)]
        if len(texts) > 2 and not all(text.strip() for text in texts[2:]):
            empty = next(column for column, text in zip(self.negatives, texts[2:]) if not text.strip())
            raise DataError("expected a text in every row, found an empty one", column=empty)
        values: Row = dict(zip(("text", "text_pair"), texts))
        if self.negatives:
            values["negatives"] = texts[2:]
        column = data.label_columns[0]
        if info.problem_type == LABELED:
            label = _classes().canonical(row, data, replace(info, problem_type=SINGLE))["label"]
            return values | {"label": label}
        if info.problem_type == SCORED:
            return values | {"label": self._score(row.get(column), column)}
        if texts[0] == texts[1]:
            raise DataError(f"both texts are the same: {shorten(texts[0])}; leave the row out", column=data.text_pair)
        if texts[1] in texts[2:]:
            raise DataError("the second text is among the negatives; leave the row out", column=data.text_pair)
        return values

    def _score(self, value: Any, column: str) -> float:
        score = number(value)
        if score is None:
            remedy = "task.loss=ranking leaves the column out" if isinstance(value, str) else "give each pair a score"
            raise DataError(
                f"expected a number that says how alike the texts are, found {shorten(value)}; {remedy}", column=column
            )
        if self.loss == "mse" and not -1 <= score <= 1:
            raise DataError(
                f"task.loss=mse compares scores with cosines, from -1 to 1, found {score:g}; divide the scores, or use "
                "task.loss=cosent, which needs their order only", column=column,
            )  # fmt: skip
        return score

    def source_columns(self, data: DataConfig) -> set[str]:
        return super().source_columns(data) | set(self.negatives)

    def input_columns(self, data: DataConfig) -> tuple[str, ...]:
        return (data.text, data.text_pair or "text_pair")

    def input_row(self, values: Sequence[str]) -> Row:
        """A pair; raises DataError for a single text, which has a vector and nothing to predict."""
        if len(values) != 2:
            raise DataError(
                "expected (text, text) pairs, of which this model gives the cosine; for the vectors of texts use embed"
            )
        return dict(zip(("text", "text_pair"), values))

    def text_of(self, row: Row) -> str:
        return f"{row['text']}\n{row['text_pair']}" if "text_pair" in row else row["text"]

    def identity(self, row: Row) -> str:
        """Rows that are the same in every text."""
        return "\0".join([row["text"], row.get("text_pair") or "", *(row.get("negatives") or ())])

    def is_blank(self, row: Row) -> bool:
        return not all(str(row[name]).strip() for name in ("text", "text_pair") if row.get(name) is not None)

    def with_text(self, row: Row, change: Callable[[str], str]) -> Row:
        changed: Row = {name: change(row[name]) for name in ("text", "text_pair") if name in row}
        if self.negatives:
            changed["negatives"] = [change(text) for text in row["negatives"]]
        return {**row, **changed}

    def stratum(self, row: Row) -> str:
        label = row.get("label")
        return str(label) if isinstance(label, int) else ""

    def review(
        self, strata: Mapping[str, Mapping[str, int]], info: TaskInfo
    ) -> Iterable[tuple[str, str, int, tuple[str, ...]]]:
        """Classes with a single text in training, which have nothing to be like."""
        if info.problem_type != LABELED:
            return
        alone = [name for name, count in strata.get("train", {}).items() if count == 1]
        if alone:
            names = tuple(info.labels[int(name)] for name in alone[:8])
            yield "single_texts", "train", len(alone), names

    # -- tokens ----------------------------------------------------------------------------------------------------

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """The tokens of a row's texts one after the other; ``parts`` are their lengths, ``texts`` numbers as names.

        Rows to be predicted have no scores, and weight 0.
        """
        columns = [list(rows["text"])]
        if "text_pair" in rows:
            columns.append(list(rows["text_pair"]))
        if "negatives" in rows:
            columns += [list(texts) for texts in zip(*rows["negatives"])]
        encoded, truncated = zip(*(tokenize(texts, None, tokenizer, data.max_length) for texts in columns))
        count = len(columns[0])
        ids = [[one["input_ids"][row] for one in encoded] for row in range(count)]
        known = info.problem_type == PAIRS or "label" in rows
        out: dict[str, list[Any]] = {"input_ids": [[token for part in parts for token in part] for parts in ids]}
        if "token_type_ids" in encoded[0]:
            out["token_type_ids"] = [[0] * len(tokens) for tokens in out["input_ids"]]
        return out | {
            "labels": list(rows["label"]) if "label" in rows else [0.0] * count,
            "weight": [float(known)] * count,
            "row": list(range(count)),
            "parts": [[len(part) for part in parts] for parts in ids],
            "texts": [[_name(texts[row]) for texts in columns] for row in range(count)],
            "truncated": [sum(cut[row] for cut in truncated) for row in range(count)],
        }


def _classes() -> Classification:
    """Reads a column of classes."""
    return Classification(problem_type=SINGLE)


def _name(text: str) -> int:
    """A number that no other text has, but for one chance in 10^18."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - NAME_BITS)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"expected text, found {shorten(value)}", column=column)
    return value or ""
