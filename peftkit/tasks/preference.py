"""Preferences: the model learns from which answer is better, with a choice of losses.

    task: {kind: preference, loss: {kind: dpo, beta: 0.1}}
    data: {source: my.jsonl, max_length: 512}

    <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello!<|im_end|>       chosen
                                                       └───────────────┘
    <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎What?<|im_end|>        rejected
                                                       └──────────────┘

Only the tokens of the answers count, each with its stop token. A canonical row is ``{"messages": the prompt's turns,
"chosen": […], "rejected": […]}``, or ``{"messages": …, "answer": […], "desirable": true}`` for a loss over marks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.errors import DataError
from peftkit.heads.preference_losses import LOSSES, MARKS, PAIRS
from peftkit.models import chat_template
from peftkit.schema.registries import TASKS
from peftkit.schema.sections import DiscriminatedBy
from peftkit.schema.types import Row, TaskInfo
from peftkit.tasks import preference_rows as reading
from peftkit.tasks.control_tokens import places, warn_of_control_tokens
from peftkit.tasks.conversation import Message, check_columns
from peftkit.tasks.language import LanguageTask, check_window, refuse_augmentation
from peftkit.tasks.scored_tokens import Labelled, pieces_of, tokenize
from peftkit.tasks.windows import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig

log = logging.getLogger(__name__)


@TASKS.register("preference")
class Preference(LanguageTask):
    """Learns which answer is better (DPO, IPO, ORPO, SimPO, CPO), or whether one is good (KTO)."""

    heads: ClassVar[tuple[str, ...]] = (PAIRS, MARKS)
    json_rows: ClassVar[bool] = True

    kind: Literal["preference"] = "preference"
    loss: Annotated[Any, DiscriminatedBy(LOSSES)] = Field(default="dpo", validate_default=True)
    """How a preference is learned: dpo, ipo, hinge, orpo, simpo or cpo over chosen and rejected answers, kto over good
    and bad ones."""
    too_long: Literal["drop", "error"] = "drop"
    """What happens to a row whose prompt alone fills data.max_length, so that nothing of an answer is left."""

    def head_options(self, info: TaskInfo) -> dict[str, Any]:
        return {"objective": self.loss}

    def texts_per_row(self, data: DataConfig) -> int:
        """The chosen and the rejected conversation of a pair."""
        return 2 if self._pairs else 1

    @property
    def packs(self) -> bool:
        return False

    def without_packing(self) -> Preference:
        return self

    @property
    def _pairs(self) -> bool:
        return bool(self.loss.head == PAIRS)

    # -- reading rows ----------------------------------------------------------------------------------------------

    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Raises DataError where a split's rows hold no answers as the loss needs them."""
        refuse_augmentation(data)
        reading.check_names(data.columns)
        for rows in splits.values():
            (reading.check_pairs if self._pairs else reading.check_marks)(rows.column_names, data)
        if isinstance(data.source, str):
            check_columns({name for rows in splits.values() for name in rows.column_names}, data.columns)
        return TaskInfo(self.loss.head)

    def source_columns(self, data: DataConfig) -> set[str]:
        return super().source_columns(data) | reading.NAMES

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """Raises DataError for equal or empty answers, an unknown mark, and turns that do not follow one another."""
        if self._pairs:
            pair = reading.read_pair(row, data)
            return {"messages": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        marked = reading.read_marked(row, data)
        return {"messages": marked.prompt, "answer": marked.answer, "desirable": marked.desirable}

    def remarks(self, row: Row, data: DataConfig, info: TaskInfo) -> Iterable[tuple[str, str]]:
        return (reading.read_pair(row, data) if self._pairs else reading.read_marked(row, data)).remarks

    def text_of(self, row: Row) -> str:
        """The prompt and the answers, without system prompts."""
        turns = [turn for name in ("messages", *self._answers) for turn in row[name]]
        return "\n".join(turn["content"] for turn in turns if turn["role"] != "system")

    def with_text(self, row: Row, change: Any) -> Row:
        changed = {
            name: [{**turn, "content": change(turn["content"])} for turn in row[name]]
            for name in ("messages", *self._answers)
        }
        return {**row, **changed}

    def stratum(self, row: Row) -> str:
        """Whether the answer is good, so that every split has both; nothing for pairs."""
        return "" if self._pairs else ("good" if row["desirable"] else "bad")

    @property
    def _answers(self) -> tuple[str, ...]:
        return ("chosen", "rejected") if self._pairs else ("answer",)

    # -- tokens ----------------------------------------------------------------------------------------------------

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """Rows → examples; ``labels`` are -100 but on the answers' tokens, and are not shifted; ``weight`` is 1.

        A pair's ``input_ids`` are the chosen sequence and then the rejected one, ``chosen_tokens`` those of the first.
        A marked row has ``desirable``, and ``mismatched_ids`` and ``mismatched_labels``: its prompt with the answer of
        the nearest row before it that has another prompt, the last counting as before the first, among the rows that
        are encoded together. ``scored`` are the tokens that reach the output layer.

        Answers are cut at the end of ``data.max_length``. A row without room for an answer makes no example, and a
        warning names it.

        Raises:
            ModelError: there is no chat template, or it cannot be used.
            DataError: the template fails on a row, or (``too_long=error``) a prompt fills the window.
        """
        check_window(tokenizer, data)
        style = chat_template.read(tokenizer)
        if style.note:
            log.warning(style.note)
        turns = [[*rows["messages"][row], *(turn for name in self._answers for turn in rows[name][row])]
                 for row in range(len(rows["messages"]))]  # fmt: skip
        warn_of_control_tokens([[turn["content"] for turn in one] for one in turns], rows, tokenizer)
        sequences = _tokens(rows, self._answers, tokenizer, style)
        kept, lost = [], []
        for row, answers in enumerate(sequences):
            longest = max(one.prompt_length for one in answers)
            if longest < data.max_length:
                kept.append(row)
            elif self.too_long == "error":
                takes = f"the prompt takes {longest} tokens and data.max_length is {data.max_length}"
                hint = "raise data.max_length, or set task.too_long=drop"
                raise _placed(rows, row, f"{takes}, so nothing of an answer is left; {hint}")
            else:
                lost.append(row)
        if lost:
            log.warning(
                "%d of %d rows are left out: their prompts alone fill data.max_length=%d%s",
                len(lost), len(sequences), data.max_length, places(rows, lost),
            )  # fmt: skip
        columns: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "weight", "row", "truncated")}
        for row in kept:
            parts = [_cut(one, data.max_length) for one in sequences[row]]
            columns["input_ids"].append([token for ids, _ in parts for token in ids])
            columns["labels"].append([label for _, labels in parts for label in labels])
            columns["weight"].append(1.0)
            columns["row"].append(row)
            columns["truncated"].append(sum(max(0, len(one.ids) - data.max_length) for one in sequences[row]))
        if self._pairs:
            columns["chosen_tokens"] = [min(len(sequences[row][0].ids), data.max_length) for row in kept]
        else:
            columns |= _mismatched(rows, kept, [sequences[row][0] for row in kept], data.max_length)
        columns["scored"] = [_scored(labels) for labels in columns["labels"]]
        return columns

    # -- prompts ---------------------------------------------------------------------------------------------------

    def prompt(self, row: Row) -> tuple[list[Message], str]:
        """(the prompt's turns and all but the last of the answer's, that one); a bad answer is no reference."""
        answer = row[self._answers[0]]
        return [*row["messages"], *answer[:-1]], answer[-1]["content"] if row.get("desirable", True) else ""

    def as_prompt(self, text: str) -> list[Message]:
        return [{"role": "user", "content": text}]


def _tokens(
    rows: Mapping[str, Sequence[Any]], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase,
    style: chat_template.TurnStyle,
) -> list[list[Labelled]]:  # fmt: skip
    """Every row's sequences, one for each answer; raises DataError with the row's file and line."""
    row, examples = 0, []
    try:
        for row, prompt in enumerate(rows["messages"]):
            masked = [index for index, turn in enumerate(prompt) if turn["role"] == "assistant"]
            for name in answers:
                pieces = pieces_of([*prompt, *rows[name][row]], tokenizer, style, "assistant", masked)
                if len(pieces) > 1:
                    change = "the chat template writes earlier answers differently once others follow"
                    raise DataError(f"{change}, so that the {name} one cannot have several; keep the last exchange")
                examples += pieces
        labelled, sequences = tokenize(examples, tokenizer, style), list[list[Labelled]]()
        while len(sequences) < len(rows["messages"]):
            row = len(sequences)
            sequences.append([next(labelled) for _ in answers])
    except DataError as error:
        raise _placed(rows, row, error.message) from None
    return sequences


def _cut(labelled: Labelled, size: int) -> tuple[list[int], list[int]]:
    return labelled.ids[:size], labelled.labels[:size]


def _scored(labels: Sequence[int]) -> int:
    return sum(label != IGNORE for label in labels)


def _mismatched(
    rows: Mapping[str, Sequence[Any]], kept: Sequence[int], sequences: Sequence[Labelled], size: int
) -> dict[str, list[Any]]:
    """Every kept row's prompt with the answer of another; its own tokens, none of them scored, where there is none."""
    columns: dict[str, list[Any]] = {"desirable": [bool(rows["desirable"][row]) for row in kept]}
    ids, labels = [], []
    prompts = [rows["messages"][row] for row in kept]
    for index, own in enumerate(sequences):
        others = (index - step for step in range(1, len(sequences)))
        other = next((sequences[place] for place in others if prompts[place] != prompts[index]), None)
        prompt = own.ids[: own.prompt_length]
        answer = [] if other is None else other.ids[other.prompt_length :]
        ids.append([*prompt, *answer][:size])
        labels.append([*[IGNORE] * len(prompt), *answer][:size])
    return {**columns, "mismatched_ids": ids, "mismatched_labels": labels}


def _placed(rows: Mapping[str, Sequence[Any]], row: int, message: str) -> DataError:
    """An error about a canonical row, with the file and line that it came from."""
    file, line = (rows[name][row] if name in rows else None for name in ("_file", "_line"))
    return DataError(message, file=file, line=line, column="messages")
