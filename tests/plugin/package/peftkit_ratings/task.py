"""Ratings on a scale from 1 to N."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.errors import DataError
from peftkit.schema.task import Task
from peftkit.schema.types import TaskInfo
from peftkit.tasks.tokens import tokenize


class Rating(Task):
    """Learns the rating of a text on a scale from 1 to N."""

    heads: ClassVar[tuple[str, ...]] = ("ordinal",)

    kind: Literal["rating"] = "rating"
    scale: Annotated[int, Field(ge=3)] = 5
    """The highest rating."""

    def describe(self, splits, data):
        return TaskInfo("ordinal", tuple(str(rating) for rating in range(1, self.scale + 1)))

    def canonical(self, row, data, info):
        rating = int(row[data.label])
        if not 1 <= rating <= self.scale:
            raise DataError(f"expected a rating from 1 to {self.scale}, found {rating}", column=data.label)
        kept = {name: row[name] for name in ("_file", "_line") if name in row}
        return {"text": row[data.text], "label": rating - 1, **kept}

    def text_of(self, row):
        return row["text"]

    def encode(self, rows, tokenizer, data, info) -> dict[str, list[Any]]:
        encoded, truncated = tokenize(list(rows["text"]), None, tokenizer, data.max_length)
        count = len(truncated)
        labels = list(rows["label"]) if "label" in rows else [0] * count
        weights = [1.0 if "label" in rows else 0.0] * count
        columns = {"labels": labels, "weight": weights, "row": list(range(count)), "truncated": truncated}
        return {"input_ids": encoded["input_ids"], **columns}
