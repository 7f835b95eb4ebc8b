"""Instruction tuning: the model learns the assistant's turns of conversations, each with its stop token.

    task: {kind: instruction}
    data: {source: my.jsonl, format: auto, max_length: 512}

    <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello<|im_end|>
                                                       └──────────────┘ scored

The conversation is rendered by the base model's own chat template; which tokens are the assistant's follows from the
rendering itself (see ``scored_tokens``). A canonical row is ``{"messages": [{"role": …, "content": …}, …]}``, with
``masked``, the indexes of turns that are not to be learned, where there are any.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.errors import DataError
from peftkit.models import chat_template
from peftkit.schema.registries import TASKS
from peftkit.schema.types import Row, TaskInfo
from peftkit.tasks.control_tokens import places, warn_of_control_tokens
from peftkit.tasks.conversation import COLUMNS, NAMES, Message, check_columns, format_of, read_row
from peftkit.tasks.language import CAUSAL_LM, LanguageTask, check_window, refuse_augmentation
from peftkit.tasks.scored_tokens import Labelled, TrainOn, fit, pieces_of, tokenize
from peftkit.tasks.windows import pack, to_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig

log = logging.getLogger(__name__)


@TASKS.register("instruction")
class Instruction(LanguageTask):
    """Learns to answer single questions, or in conversations of many turns."""

    json_rows: ClassVar[bool] = True

    kind: Literal["instruction"] = "instruction"
    train_on: TrainOn = "assistant"
    """Which tokens are scored: every assistant turn, only the last one, or all of the conversation."""
    packing: bool = False
    """Put several conversations into one window of data.max_length; none attends to another."""
    too_long: Literal["drop", "error"] = "drop"
    """What happens to a row whose prompt alone fills data.max_length, so that nothing of its answer is left."""

    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Raises DataError where a split's rows are in no known format, or lack a column that the recipe names."""
        refuse_augmentation(data)
        for rows in splits.values():
            format_of(rows.column_names, data.format, data.columns)
        if isinstance(data.source, str):  # of several sources, each may have columns of its own
            check_columns({name for rows in splits.values() for name in rows.column_names}, data.columns)
        return TaskInfo(CAUSAL_LM)

    def source_columns(self, data: DataConfig) -> set[str]:
        return super().source_columns(data) | NAMES

    @classmethod
    def example_info(cls, *, decoder: bool) -> TaskInfo | None:
        return TaskInfo(CAUSAL_LM) if decoder else None

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """The row as ``messages`` with the roles system, user and assistant, and ``masked``.

        Raises:
            DataError: names the column and the turn. An answer without text is one too, unless
                ``data.cleaning.empty=drop`` has such rows dropped.
        """
        kind = format_of(row, data.format, data.columns)
        column = data.columns.get(COLUMNS[kind][-1], COLUMNS[kind][-1])
        conversation = read_row(row, kind, data)
        self._check_flags(conversation.messages, conversation.flags, column)
        canonical: Row = {"messages": conversation.messages}
        if masked := conversation.masked:  # absent from other rows, so that fingerprints of their data stay
            canonical["masked"] = masked
        blank = _blank_answer(canonical)
        if blank and data.cleaning.empty == "error":
            message = f"turn {blank}: the assistant's answer is empty; fill it, or set data.cleaning.empty=drop"
            raise DataError(message, column=column)
        return canonical

    def _check_flags(self, messages: Sequence[Message], flags: Sequence[bool | None], column: str) -> None:
        """Raises DataError for turns that are to be learned or not, against ``train_on``, and where none is left."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for index, learned in enumerate(flags):
            if index in answers or learned is None or learned == (self.train_on == "all"):
                continue
            role, wanted = messages[index]["role"], "not to be" if self.train_on == "all" else "to be"
            problem = f"this turn of the {role}'s is flagged as {wanted} learned, against task.train_on={self.train_on}"
            hint = "take the flag off, or set task.train_on=" + ("assistant" if self.train_on == "all" else "all")
            raise DataError(f"turn {index + 1}: {problem}; {hint}", column=column)
        wanted_answers = answers[-1:] if self.train_on == "last" else answers
        if all(flags[index] is False for index in wanted_answers):
            which = "the last answer" if self.train_on == "last" else "every answer"
            message = f"{which} is flagged as not to be learned, so nothing can be learned from this row; take it out"
            raise DataError(message, column=column)

    def remarks(self, row: Row, data: DataConfig, info: TaskInfo) -> Iterable[tuple[str, str]]:
        """not_used, masked_turns, unanswered_turns, null_words and turns_in_text; see ``conversation``."""
        conversation = read_row(row, format_of(row, data.format, data.columns), data)
        return [*conversation.remarks, *([("masked_turns", "")] if conversation.masked else [])]

    def text_of(self, row: Row) -> str:
        """All turns; nothing where an answer is empty, so that the row counts as an empty one."""
        if _blank_answer(row):
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
        warn_of_control_tokens([[turn["content"] for turn in turns] for turns in rows["messages"]], rows, tokenizer)
        stretches, lost = [], []
        masked = rows["masked"] if "masked" in rows else [None] * len(rows["messages"])
        conversations = list(zip(range(len(masked)), rows["messages"], masked, strict=True))
        for row, labelled in _encode(rows, conversations, tokenizer, style, self.train_on):
            messages = list(rows["messages"][row])
            # where only the last answer counts, early turns give way to it
            while self.train_on == "last" and len(labelled.ids) > data.max_length and _drop_first_exchange(messages):
                ((_, labelled),) = _encode(rows, [(row, messages, None)], tokenizer, style, self.train_on)
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
        """(the turns before the last answer that is learned, that answer), for sample generations."""
        messages, masked = row["messages"], row.get("masked") or ()
        answers = (index for index, message in enumerate(messages) if message["role"] == "assistant")
        last = max(index for index in answers if index not in masked)
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
    conversations: Sequence[tuple[int, Sequence[Message], Sequence[int] | None]],
    tokenizer: PreTrainedTokenizerBase,
    style: chat_template.TurnStyle,
    train_on: TrainOn,
) -> list[tuple[int, Labelled]]:
    """(row, tokens) of every example; raises DataError with the row's file and line."""
    row, numbers, examples = 0, [], []
    try:
        for row, messages, masked in conversations:
            pieces = pieces_of(messages, tokenizer, style, train_on, masked or ())
            numbers += [row] * len(pieces)
            examples += pieces
        labelled, encoded = tokenize(examples, tokenizer, style), []
        for row in numbers:
            encoded.append((row, next(labelled)))
    except DataError as error:
        raise _placed(rows, row, error.message) from None
    return encoded


def _blank_answer(row: Row) -> int:
    """The number, from 1, of the first answer to be learned that has no text; 0 where there is none."""
    masked = row.get("masked") or ()
    for index, message in enumerate(row["messages"]):
        if message["role"] == "assistant" and index not in masked and not message["content"].strip():
            return index + 1
    return 0


def _warn_of_lost(rows: Mapping[str, Sequence[Any]], lost: Sequence[int], max_length: int) -> None:
    """Warns of prompts that fill the window; a row of several examples may have lost only some of them."""
    if lost:
        log.warning(
            "%d of %d rows are left out: their prompts alone fill data.max_length=%d%s",
            len(set(lost)), len(rows["messages"]), max_length, places(rows, lost),
        )  # fmt: skip


def _placed(rows: Mapping[str, Sequence[Any]], row: int, message: str) -> DataError:
    """An error about a canonical row, with the file and line that it came from."""
    file, line = (rows[name][row] if name in rows else None for name in ("_file", "_line"))
    return DataError(message, file=file, line=line, column="messages")
