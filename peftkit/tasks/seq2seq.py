"""Sequence-to-sequence: an encoder–decoder learns to write a text from another one.

    task: {kind: seq2seq, prefix: "summarize: "}
    data: {source: articles.csv, text: article, label: summary, max_length: 512}

    encoder   summarize: The storm … </s>
    decoder   <start> A storm hit …      predicts      A storm hit … </s>

Summaries, translations and rewritings, with T5, FLAN-T5, mT5, BART, Pegasus and their like. Every token of the target
is scored, the end of text among them. A canonical row is ``{"text": the source, "target": the target}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.data.problems import require_column
from peftkit.errors import DataError, ModelError, RecipeError
from peftkit.heads.seq2seq import NAME
from peftkit.schema.registries import TASKS
from peftkit.schema.types import Row, TaskInfo
from peftkit.tasks.control_tokens import warn_of_control_tokens
from peftkit.tasks.language import LanguageTask, refuse_augmentation
from peftkit.tasks.tokens import tokenize
from peftkit.tasks.windows import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig


@TASKS.register("seq2seq")
class Seq2Seq(LanguageTask):
    """Learns to write one text from another: summarization, translation, rewriting."""

    heads: ClassVar[tuple[str, ...]] = (NAME,)

    kind: Literal["seq2seq"] = "seq2seq"
    prefix: str = ""
    """What every source begins with, such as T5's "summarize: "; prompts get it, too."""
    max_target_length: Annotated[int, Field(ge=2)] = 128
    """Most tokens of a target, with its end of text; data.max_length bounds the source."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a row whose target is longer: without its end, a text that never ends would be learned."""

    @property
    def packs(self) -> bool:
        return False

    def without_packing(self) -> Seq2Seq:
        return self

    def texts_per_row(self, data: DataConfig) -> int:
        """The source, and as many more as the target is long."""
        return 1 + math.ceil(self.max_target_length / data.max_length)

    def head_options(self, info: TaskInfo) -> dict[str, Any]:
        return {"target_length": self.max_target_length}

    # -- reading rows ----------------------------------------------------------------------------------------------

    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Raises DataError where a split lacks a column, and RecipeError for several columns of targets."""
        refuse_augmentation(data)
        if len(data.label_columns) > 1 or data.text_pair is not None:
            raise RecipeError(
                "task.kind=seq2seq reads one source (data.text) and one target (data.label); leave data.text_pair and "
                "further columns of data.label out"
            )
        for rows in splits.values():
            require_column(rows, data.text, "data.text")
            require_column(rows, data.label_columns[0], "data.label")
        return TaskInfo(NAME)

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """Raises DataError for a source or target that is no text.

        A row with an empty one is an error, unless ``data.cleaning.empty=drop`` has such rows dropped.
        """
        source, target = _text(row, data.text), _text(row, data.label_columns[0])
        if not target.strip() and data.cleaning.empty == "error":
            hint = "fill it, or set data.cleaning.empty=drop"
            raise DataError(f"the target is empty; {hint}", column=data.label_columns[0])
        return {"text": source, "target": target}

    def text_of(self, row: Row) -> str:
        """Source and target; nothing where one of them is empty."""
        parts = [row["text"].strip(), row.get("target", "-").strip()]
        return "\n".join(parts) if all(parts) else ""

    def with_text(self, row: Row, change: Any) -> Row:
        return {**row, "text": change(row["text"]), "target": change(row["target"])}

    # -- tokens ----------------------------------------------------------------------------------------------------

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """``input_ids``: source, then target; ``labels``: -100 on the source; ``weight``: tokens of the target.

        Sources are cut at ``data.max_length``, and keep their end of text; ``truncated`` counts what they lost.

        Raises:
            ModelError: the tokenizer has no end of text, so that the model could not learn where to stop.
            DataError: a target of more than ``max_target_length`` tokens, unless ``too_long=drop``.
        """
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-text token (eos_token), so no target would end")
        warn_of_control_tokens(list(zip(rows["text"], rows["target"], strict=True)), rows, tokenizer)
        sources, truncated = tokenize([self.prefix + text for text in rows["text"]], None, tokenizer, data.max_length)
        targets: Any = tokenizer(text_target=list(rows["target"]), return_attention_mask=False, verbose=False)
        columns: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "weight", "row", "truncated")}
        for row, (source, ids) in enumerate(zip(sources["input_ids"], targets["input_ids"], strict=True)):
            target = list(ids) if tokenizer.eos_token_id in ids[-2:] else [*ids, tokenizer.eos_token_id]
            if len(target) > self.max_target_length:
                if self.too_long == "drop":
                    continue
                raise _too_long(rows, row, len(target), self.max_target_length, data)
            columns["input_ids"].append([*source, *target])
            columns["labels"].append([*[IGNORE] * len(source), *target])
            columns["weight"].append(float(len(target)))
            columns["row"].append(row)
            columns["truncated"].append(truncated[row])
        return columns

    # -- prompts ---------------------------------------------------------------------------------------------------

    def prompt(self, row: Row) -> tuple[str, str]:
        """(the source with its prefix, the target)."""
        return self.as_prompt(row["text"]), row["target"]

    def as_prompt(self, text: str) -> str:
        return self.prefix + text


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"expected text, found {type(value).__name__} {str(value)[:40]!r}", column=column)
    return value or ""


def _too_long(rows: Mapping[str, Sequence[Any]], row: int, tokens: int, limit: int, data: DataConfig) -> DataError:
    file, line = (rows[name][row] if name in rows else None for name in ("_file", "_line"))
    message = (
        f"the target has {tokens} tokens with its end of text, and task.max_target_length is {limit}; raise it, "
        "shorten the target, or set task.too_long=drop"
    )
    return DataError(message, file=file, line=line, column=data.label_columns[0])
