"""What every task on a language model shares."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, ClassVar

from peftkit.errors import DataError, RecipeError
from peftkit.heads.causal_lm import NAME as CAUSAL_LM
from peftkit.models.context import usable_length
from peftkit.schema.task import Task
from peftkit.schema.types import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig


class LanguageTask(Task):
    """Learns to predict the scored tokens of each example."""

    heads: ClassVar[tuple[str, ...]] = (CAUSAL_LM,)
    merges_sources: ClassVar[bool] = False

    if TYPE_CHECKING:
        packing: bool  # a field of each task, in an order of its own

    def identity(self, row: Row) -> str:
        """All that is read or learned, to the letter: indentation and case are part of what a model writes."""
        content = {name: value for name, value in row.items() if not name.startswith("_")}
        return json.dumps(content, sort_keys=True, ensure_ascii=False)

    @property
    def packs(self) -> bool:
        return self.packing

    def without_packing(self) -> LanguageTask:
        return self.model_copy(update={"packing": False})


def document(row: Row, data: DataConfig) -> Row:
    """A source's row as ``text``; raises DataError when it is not text. A null is an empty document."""
    text = row.get(data.text)
    if text is not None and not isinstance(text, str):
        raise DataError(f"expected text, found {type(text).__name__} {str(text)[:40]!r}", column=data.text)
    return {"text": text or ""}


def refuse_augmentation(data: DataConfig) -> None:
    """Raises RecipeError: changed words would be learned as the text to write."""
    if data.augmentation is not None:
        effect = "changes words of the text, and a language model would learn to write them so"
        raise RecipeError(f"data.augmentation {effect}; set data.augmentation=null")


def check_window(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Raises RecipeError when ``data.max_length`` is longer than what the base model reads."""
    reads = usable_length(tokenizer, data.max_length)
    if data.max_length > reads:
        message = f"data.max_length is {data.max_length}, but this base model reads {reads} tokens"
        raise RecipeError(f"{message}; set data.max_length={reads} or less")
