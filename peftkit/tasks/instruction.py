"""Instruction tuning: the model learns the assistant's turns of conversations, each with its stop token.

    task: {kind: instruction}
    data: {source: my.jsonl, format: auto, max_length: 512}

    <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello<|im_end|>
                                                       └──────────────┘ scored

The conversation is rendered by the base model's own chat template; which tokens are the assistant's follows from the
rendering itself (see ``scored_tokens``). A canonical row is ``{"messages": [{"role": …, "content": …}, …]}``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from peftkit.errors import DataError
from peftkit.models import chat_template
from peftkit.schema.registries import TASKS
from peftkit.schema.types import Row, TaskInfo
from peftkit.tasks.conversation import COLUMNS, OPTIONAL, Message, format_of, read_row
from peftkit.tasks.language import CAUSAL_LM, LanguageTask, check_window, refuse_augmentation
from peftkit.tasks.scored_tokens import Labelled, TrainOn, fit, pieces_of, tokenize
from peftkit.tasks.windows import pack, to_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig

log = logging.getLogger(__name__)
SHOWN = 5
"""Rows named in a warning."""


@TASKS.register("instruction")
class Instruction(LanguageTask):
    """Learns to answer single questions, or in conversations of many turns."""

    kind: Literal["instruction"] = "instruction"
    train_on: TrainOn = "assistant"
    """Which tokens are scored: every assistant turn, only the last one, or all of the conversation."""
    packing: bool = False
    """Put several conversations into one window of data.max_length; none attends to another."""
    too_long: Literal["drop", "error"] = "drop"
    """What happens to a row whose prompt alone fills data.max_length, so that nothing of its answer is left."""

    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Raises DataError where a split's rows are in no known format."""
        refuse_augmentation(data)
        for rows in splits.values():
            format_of(rows.column_names, data.format, data.columns)
        return TaskInfo(CAUSAL_LM)

    def source_columns(self, data: DataConfig) -> set[str]:
        return super().source_columns(data) | {*OPTIONAL, *(name for names in COLUMNS.values() for name in names)}

    @classmethod
    def example_info(cls, *, decoder: bool) -> TaskInfo | None:
        return TaskInfo(CAUSAL_LM) if decoder else None

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """The row as ``messages`` with the roles system, user and assistant.

        Raises:
            DataError: names the column and the turn. An answer without text is one too, unless
                ``data.cleaning.empty=drop`` has such rows dropped.
        """
        kind = format_of(row, data.format, data.columns)
        messages = read_row(row, kind, data.columns, data.system)
        blank = _blank_answer(messages)
        if blank and data.cleaning.empty == "error":
            name = COLUMNS[kind][-1]
            message = f"turn {blank}: the assistant's answer is empty; fill it, or set data.cleaning.empty=drop"
            raise DataError(message, column=data.columns.get(name, name))
        return {"messages": messages}

    def text_of(self, row: Row) -> str:
        """All turns; nothing where an answer is empty, so that the row counts as an empty one."""
        if _blank_answer(row["messages"]):
            return ""
        return "\n".join(message["content"] for message in row["messages"] if message["role"] != "system")

    def with_text(self, row: Row, change: Any) -> Row:
        messages = [{**message, "content": change(message["content"])} for message in row["messages"]]
        return {**row, "messages": messages}

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """Conversations → examples; ``labels`` are -100 but on the scored tokens, and are not shifted.

        Rows of which no scored token would be left make no example, and a warning names them. With packing, an example
        is a window; see ``windows.pack``.

        Raises:
            ModelError: there is no chat template, or it cannot be used.
            DataError: the template fails on a row, or (``too_long=error``) a prompt fills the window.
        """
        check_window(tokenizer, data)
        style = chat_template.read(tokenizer)
        _warn_once(style.note)
        stretches, lost = [], []
        for row, labelled in _encode(rows, list(enumerate(rows["messages"])), tokenizer, style, self.train_on):
            messages = list(rows["messages"][row])
            # where only the last answer counts, early turns give way to it
            while self.train_on == "last" and len(labelled.ids) > data.max_length and _drop_first_exchange(messages):
                ((_, labelled),) = _encode(rows, [(row, messages)], tokenizer, style, self.train_on)
            fitting = fit(labelled, row, data.max_length, self.train_on)
            if fitting:
                stretches.append(fitting)
            elif self.too_long == "error":
                takes = f"the prompt takes {labelled.prompt_length} tokens and data.max_length is {data.max_length}"
                hint = "raise data.max_length, or set task.too_long=drop"
                raise _placed(rows, row, f"{takes}, so nothing of its answer is left; {hint}")
            else:
                lost.append(row)
        _warn_of_lost(rows, lost, data.max_length)
        windows = pack(stretches, data.max_length) if self.packing else [[item] for item in stretches]
        return to_columns(windows, positions=self.packing)

    def prompt(self, row: Row) -> tuple[list[Message], str]:
        """(the turns before the last answer, that answer), for sample generations."""
        messages = row["messages"]
        last = _last_answer(messages)
        return messages[:last], messages[last]["content"]

    def as_prompt(self, text: str) -> list[Message]:
        return [{"role": "user", "content": text}]


@lru_cache(maxsize=8)
def _warn_once(note: str) -> None:
    if note:
        log.warning(note)


def _drop_first_exchange(messages: list[Message]) -> bool:
    """Takes the first question and answer out of a conversation; False where the last answer's own is the first."""
    roles = [message["role"] for message in messages]
    start = int(roles[0] == "system")
    later = [index for index in range(start + 1, _last_answer(messages)) if roles[index] == "user"]
    if later:
        del messages[start : later[0]]
    return bool(later)


def _last_answer(messages: Sequence[Message]) -> int:
    """Index of the last assistant turn."""
    return max(index for index, message in enumerate(messages) if message["role"] == "assistant")


def _encode(
    rows: Mapping[str, Sequence[Any]],
    conversations: Sequence[tuple[int, Sequence[Message]]],
    tokenizer: PreTrainedTokenizerBase,
    style: chat_template.TurnStyle,
    train_on: TrainOn,
) -> list[tuple[int, Labelled]]:
    """(row, tokens) of every example; raises DataError with the row's file and line."""
    row, numbers, examples = 0, [], []
    try:
        for row, messages in conversations:
            pieces = pieces_of(messages, tokenizer, style, train_on)
            numbers += [row] * len(pieces)
            examples += pieces
        labelled, encoded = tokenize(examples, tokenizer, style), []
        for row in numbers:
            encoded.append((row, next(labelled)))
    except DataError as error:
        raise _placed(rows, row, error.message) from None
    return encoded


def _blank_answer(messages: Sequence[Message]) -> int:
    """The number, from 1, of the first assistant turn without text; 0 where there is none."""
    turns = enumerate(messages, 1)
    return next((n for n, message in turns if message["role"] == "assistant" and not message["content"].strip()), 0)


def _warn_of_lost(rows: Mapping[str, Sequence[Any]], lost: Sequence[int], max_length: int) -> None:
    """Warns of prompts that fill the window; a row of several examples may have lost only some of them."""
    if not lost:
        return
    places = [f"{rows['_file'][row]}:{rows['_line'][row]}" for row in lost[:SHOWN]] if "_file" in rows else []
    more = ", …" if len(lost) > SHOWN else ""
    log.warning(
        "%d of %d rows are left out: their prompts alone fill data.max_length=%d%s",
        len(set(lost)), len(rows["messages"]), max_length, f" ({', '.join(places)}{more})" if places else "",
    )  # fmt: skip


def _placed(rows: Mapping[str, Sequence[Any]], row: int, message: str) -> DataError:
    """An error about a canonical row, with the file and line that it came from."""
    file, line = (rows[name][row] if name in rows else None for name in ("_file", "_line"))
    return DataError(message, file=file, line=line, column="messages")
