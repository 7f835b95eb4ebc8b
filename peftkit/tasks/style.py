"""Style: language modeling of documents, so that the model writes like them.

    task: {kind: style}
    data: {source: my_texts/, max_length: 512}

    window 1: [In the beginning … <eos>][Now these are the names …]
    window 2: [… names of the children …]

Documents end with the end-of-text token and are cut into full windows; attention stays within a document, and every
token of it but the first is scored exactly once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftkit.data.problems import require_column
from peftkit.errors import ModelError
from peftkit.schema.registries import TASKS
from peftkit.schema.types import Row, TaskInfo
from peftkit.tasks.control_tokens import warn_of_control_tokens
from peftkit.tasks.language import CAUSAL_LM, LanguageTask, check_window, document, refuse_augmentation
from peftkit.tasks.windows import Stretch, stream, to_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig


@TASKS.register("style")
class Style(LanguageTask):
    """Learns to continue texts like those of the data."""

    kind: Literal["style"] = "style"
    packing: bool = True
    """Fill every window of data.max_length across document boundaries; without it, a window holds one document, or a
    part of one."""
    prompt_words: Annotated[int, Field(ge=1)] = 12
    """Words of a held-out document that a sample generation starts from."""

    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Checks that every split has the column of the text; raises DataError where one has not."""
        refuse_augmentation(data)
        for rows in splits.values():
            require_column(rows, data.text, "data.text")
        return TaskInfo(CAUSAL_LM)

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """The document as ``text``; raises DataError when it is not text. A null is an empty document."""
        return document(row, data)

    def text_of(self, row: Row) -> str:
        return row["text"]

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """Documents → windows of ``data.max_length`` tokens, in which nothing is lost; see ``windows.stream``.

        Raises ModelError when the tokenizer has no end-of-text token.
        """
        check_window(tokenizer, data)
        warn_of_control_tokens([(text,) for text in rows["text"]], rows, tokenizer)
        documents = list(enumerate(tokens_of(rows["text"], tokenizer)))
        windows: list[list[Stretch]] = []
        for group in [documents] if self.packing else [[one] for one in documents]:
            windows += stream(group, data.max_length)
        return to_columns(windows, positions=self.packing)

    def prompt(self, row: Row) -> tuple[str, str]:
        """(the document's first ``prompt_words`` words, what follows), spaces and lines kept, for generation."""
        text = row["text"]
        word = next(islice(re.finditer(r"\S+", text), self.prompt_words - 1, None), None)
        end = word.end() if word else len(text)
        return text[:end], text[end:]


def tokens_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each text as tokens: BOS where the tokenizer puts one, the text, and the end-of-text token; once each."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-text token (eos_token), so documents cannot be separated")
    encoded: Any = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    opening: Any = tokenizer("a")["input_ids"][:1]
    start = [bos for bos in opening if bos == tokenizer.bos_token_id]
    return [[*start, *ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]
