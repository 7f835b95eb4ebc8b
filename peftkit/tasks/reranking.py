"""Reranking: a cross-encoder reads a query and a text together, and gives the text its place among those of the query.

    task: {kind: reranking}
    data: {source: judged.csv, text: query, text_pair: passage, label: relevance}

a text per row      text, text_pair, label              relevance 0 or 1, yes or no, or a grade up to task.max_relevance
pairs and wrong     … and task.negatives=[negative],    each row is a relevant text and others that are not, as
texts               without a label                     `peftkit mine` writes them

Rows with the same query are one list, wherever they stand, and stay in one split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.data.problems import require_column, shorten
from peftkit.errors import DataError, RecipeError
from peftkit.heads.reranker import NAME, candidates, number_of
from peftkit.schema.registries import TASKS
from peftkit.schema.task import Task
from peftkit.schema.types import Row, TaskInfo
from peftkit.tasks.control_tokens import warn_of_control_tokens
from peftkit.tasks.label_spelling import indicator, number
from peftkit.tasks.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig

LABELS = ("not relevant", "relevant")


@TASKS.register("reranking")
class Reranking(Task):
    """Learns how relevant each text is to its query, so that the texts of a query can be ordered."""

    heads: ClassVar[tuple[str, ...]] = (NAME,)

    kind: Literal["reranking"] = "reranking"
    max_relevance: Annotated[float, Field(gt=0)] = 1.0
    """The highest grade of data.label; a grade ÷ this is the probability that is learned."""
    relevant_from: Annotated[float, Field(gt=0)] | None = None
    """The grade from which a text counts as relevant in MRR and MAP; None takes any above 0. nDCG uses the grades."""
    negatives: tuple[str, ...] = ()
    """Columns with further texts for the row's query, none of them relevant, while its own is; no label is read."""

    def head_options(self, info: TaskInfo) -> dict[str, Any]:
        return {"max_relevance": self.max_relevance, "relevant_from": self.relevant_from}

    # -- reading rows ----------------------------------------------------------------------------------------------

    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Raises RecipeError for fields that do not fit, and DataError for a missing column or nothing to order."""
        if data.text_pair is None:
            raise RecipeError("task.kind=reranking needs data.text_pair: the column of the texts that a query ranks")
        if len(data.label_columns) > 1:
            raise RecipeError("data.label: task.kind=reranking reads one column of relevance")
        for field in ("labels", "label_separator"):
            if getattr(data, field) is not None:
                raise RecipeError(f"data.{field} belongs to classes, and relevance is a number; leave it out")
        self._check_columns(splits, data)
        if not self.negatives and not any(_has_order(rows, data) for rows in splits.values()):
            raise DataError(
                f"no two rows with the same query differ in relevance, so there is nothing to order; the texts of a "
                f"query are rows with the same {data.text}, or columns that task.negatives names",
                column=data.label_columns[0],
            )
        return TaskInfo(NAME, LABELS)

    def describe_file(self, splits: Mapping[str, Any], data: DataConfig, info: TaskInfo) -> TaskInfo:
        """``info``; raises DataError where a column is missing."""
        self._check_columns(splits, data)
        return info

    def _check_columns(self, splits: Mapping[str, Any], data: DataConfig) -> None:
        for rows in splits.values():
            for column, field in zip(self._texts(data), ("data.text", "data.text_pair")):
                require_column(rows, column, field)
            for column in self.negatives:
                require_column(rows, column, "task.negatives")
            if not self.negatives:
                require_column(rows, data.label_columns[0], "data.label")

    def _texts(self, data: DataConfig) -> tuple[str, ...]:
        """Columns of a row's query and texts."""
        return (data.text, str(data.text_pair), *self.negatives)

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """``text`` (the query), ``text_pair``, ``negatives`` where the recipe names columns of them, and ``label``."""
        query, text, *negatives = (_text(row, column) for column in self._texts(data))
        column = data.label_columns[0]
        label = self.max_relevance if self.negatives else self._relevance(row.get(column), column)
        values: Row = {"text": query, "text_pair": text, "label": label}
        if self.negatives:
            for name, negative in zip(self.negatives, negatives):
                if not negative.strip():
                    raise DataError("expected a text in every row, found an empty one", column=name)
                if negative == text:
                    raise DataError("the row's own text is among the negatives; leave the row out", column=name)
            values["negatives"] = negatives
        return values | {"_document": f"{number_of(query):x}"}

    def _relevance(self, value: Any, column: str) -> float:
        relevance = number(value)
        if relevance is None:
            relevance = indicator(value)
        if relevance is None:
            expected = "a number that says how relevant the text is, or yes or no"
            raise DataError(f"expected {expected}, found {shorten(value)}", column=column)
        if not 0 <= relevance <= self.max_relevance:
            hint = "set task.max_relevance to the highest grade" if relevance > 0 else "0 is not relevant"
            message = f"expected a relevance from 0 to {self.max_relevance:g} (task.max_relevance), found {relevance:g}"
            raise DataError(f"{message}; {hint}", column=column)
        return float(relevance)

    def source_columns(self, data: DataConfig) -> set[str]:
        return super().source_columns(data) | set(self.negatives)

    def input_columns(self, data: DataConfig) -> tuple[str, ...]:
        return self._texts(data)[:2]

    def input_row(self, values: Sequence[str]) -> Row:
        """A query and a text; raises DataError for a single text."""
        if len(values) != 2:
            raise DataError("expected (query, text) pairs, whose texts this model ranks")
        return dict(zip(("text", "text_pair"), values))

    def text_of(self, row: Row) -> str:
        return "\n".join((row["text"], *candidates(row)))

    def identity(self, row: Row) -> str:
        """Rows that are the same in every text, but for case and spacing."""
        return "\0".join(" ".join(text.casefold().split()) for text in (row["text"], *candidates(row)))

    def is_blank(self, row: Row) -> bool:
        return not (row["text"].strip() and row["text_pair"].strip())

    def with_text(self, row: Row, change: Callable[[str], str]) -> Row:
        changed: Row = {name: change(row[name]) for name in ("text", "text_pair")}
        if "negatives" in row:
            changed["negatives"] = [change(text) for text in row["negatives"]]
        return {**row, **changed}

    # -- tokens ----------------------------------------------------------------------------------------------------

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """An example per text: query and text as a pair; ``candidate`` counts a row's texts, ``texts`` name both.

        Rows to be predicted have no label, and weight 0.
        """
        negatives = rows.get("negatives") or [()] * len(rows["text"])
        listed = [
            (row, place, query, text)
            for row, (query, first, others) in enumerate(zip(rows["text"], rows["text_pair"], negatives, strict=True))
            for place, text in enumerate((first, *others))
        ]
        if "label" in rows:
            by_row = zip(rows["text"], rows["text_pair"], negatives)
            warn_of_control_tokens([(query, text, *others) for query, text, others in by_row], rows, tokenizer)
        numbers, places, queries, texts = (list(column) for column in zip(*listed))
        encoded, truncated = tokenize(queries, texts, tokenizer, data.max_length)
        columns: dict[str, list[Any]] = {"input_ids": encoded["input_ids"]}
        if "token_type_ids" in encoded:
            columns["token_type_ids"] = encoded["token_type_ids"]
        labels = rows.get("label")
        return columns | {
            "labels": [0.0 if place or labels is None else float(labels[row]) for row, place, _, _ in listed],
            "weight": [float(labels is not None)] * len(listed),
            "row": numbers,
            "candidate": places,
            "texts": [[number_of(query), number_of(text)] for query, text in zip(queries, texts)],
            "truncated": truncated,
        }


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"expected text, found {shorten(value)}", column=column)
    return value or ""


def _has_order(rows: Any, data: DataConfig) -> bool:
    """Whether a query has texts of different relevance."""
    grades: defaultdict[Any, set[str]] = defaultdict(set)
    for query, label in zip(rows[data.text], rows[data.label_columns[0]]):
        grades[query].add(str(label))
        if len(grades[query]) > 1:
            return True
    return False
