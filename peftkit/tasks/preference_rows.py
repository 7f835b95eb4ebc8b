"""Preference data in its usual shapes, read as one: a prompt with two answers, or with one that is good or bad.

prompt          {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}            (or lists of messages)
sharegpt        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", …}, "rejected": …}
messages        {"messages": [{"role": "user", "content": "Hi"}], "chosen": …, "rejected": …}
alpaca          {"instruction": "Translate.", "input": "chat", "chosen": "cat", "rejected": "dog"}
conversations   {"chosen": [user, assistant], "rejected": [user, assistant]}         (what they share is the prompt)

marked          any format of instruction rows with a ``label``: true or false, good or bad, 1 or 0
generations     {"prompt": …, "finetuned": …, "mark": "good"}: what peftkit's page of generations saves
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.errors import DataError, RecipeError, did_you_mean
from peftkit.tasks.conversation import NAMES as INSTRUCTION_NAMES
from peftkit.tasks.conversation import Message, RowReader, Turn, check_order, format_of, messages_of

if TYPE_CHECKING:
    from peftkit.schema.recipe import DataConfig

CHOSEN, REJECTED = "chosen", "rejected"
PROMPTS = {"sharegpt": "conversations", "messages": "messages", "prompt_completion": "prompt", "alpaca": "instruction"}
"""Format of instruction rows → the column that holds the prompt of a pair."""
GENERATED, MARK = "finetuned", "mark"
"""Columns of the generations page: the text that was judged, and how."""
GENERATION_COLUMNS = frozenset({"reference", "base", "file", "line"})
"""What else is on the generations page, for people."""
NAMES = frozenset({*INSTRUCTION_NAMES, CHOSEN, REJECTED})
MARKS = {"good": True, "desirable": True, "true": True, "yes": True, "1": True,
         "bad": False, "undesirable": False, "false": False, "no": False, "0": False}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    remarks: list[tuple[str, str]]


@dataclass(frozen=True)
class Marked:
    """A prompt and an answer that is good or bad."""

    prompt: list[Message]
    answer: list[Message]
    desirable: bool
    remarks: list[tuple[str, str]]


def check_names(columns: Mapping[str, str]) -> None:
    """Raises RecipeError where ``data.columns`` renames something that no format has."""
    for name in columns:
        if name not in NAMES:
            raise RecipeError(f"data.columns: '{name}' is no field of preference rows: {did_you_mean(name, NAMES)}")


def check_pairs(names: Sequence[str], data: DataConfig) -> None:
    """Raises DataError where a split's columns hold no pairs of answers."""
    for ours in (CHOSEN, REJECTED):
        column = data.columns.get(ours, ours)
        if column not in names:
            marks = data.label_columns[0] in names or MARK in names
            hint = "; rows with one answer and a label are learned with task.loss=kto" if marks else ""
            listed = ", ".join(name for name in names if not name.startswith("_"))
            message = f"expected a column with the {ours} answer, found {listed}: {did_you_mean(column, names)}"
            raise DataError(f"{message}; name yours with data.columns.{ours}=NAME{hint}", column=column)
    if data.format != "auto" and data.columns.get(PROMPTS[data.format], PROMPTS[data.format]) not in names:
        column = data.columns.get(PROMPTS[data.format], PROMPTS[data.format])
        raise DataError(f"data.format={data.format} needs this column: {did_you_mean(column, names)}", column=column)


def check_marks(names: Sequence[str], data: DataConfig) -> None:
    """Raises DataError where a split's columns hold no answers with a mark."""
    if _is_generation(names):
        return
    label = data.label_columns[0]
    if label not in names:
        pairs = {data.columns.get(ours, ours) for ours in (CHOSEN, REJECTED)} <= {*names}
        hint = "; rows with a chosen and a rejected answer are learned with task.loss=dpo" if pairs else ""
        listed = ", ".join(name for name in names if not name.startswith("_"))
        message = f"expected a column that says whether an answer is good, found {listed}"
        raise DataError(f"{message}: name yours with data.label=NAME{hint}", column=label)
    format_of(names, data.format, _instruction_columns(data))


def read_pair(row: Mapping[str, Any], data: DataConfig) -> Pair:
    """A row with two answers; raises DataError that names the column, and the turn, counted from 1."""
    return _Reader(data).pair(row)


def read_marked(row: Mapping[str, Any], data: DataConfig) -> Marked:
    """A row with an answer and its mark; raises DataError that names the column, and the turn, counted from 1."""
    return _Reader(data).marked(row)


class _Reader(RowReader):
    """Reads one row under a recipe's ``data`` section."""

    def pair(self, row: Mapping[str, Any]) -> Pair:
        row = self._without_ignored(row)
        names = [self._column(name) for name in (CHOSEN, REJECTED)]
        asked, column = self._asked(row)
        start = len(asked)
        # one turn may stand for a list of one
        row = {**row, **{name: [row[name]] for name in names if isinstance(row.get(name), Mapping)}}
        answers = [self._text_or_turns(row, name, "assistant", start) for name in names]
        if all(turns[0].role != "assistant" for turns in answers):
            shared = _shared(*answers)
            self._check_asked(asked, shared, column, names)
            asked, answers = shared, [turns[len(shared) :] for turns in answers]
        elif not asked:
            hint = f"or give {names[0]} and {names[1]} as whole conversations"
            raise DataError(f"there is no prompt: expected one of {', '.join(PROMPTS.values())}; {hint}")
        for name, turns in zip(names, answers, strict=True):
            _check_answer(asked, turns, name)
        if answers[0] == answers[1]:
            raise DataError(f"equal to {names[0]}, so there is nothing to prefer; take the row out", column=names[1])
        read = {*names, *([column] if column else [])}
        self._remark(row, read | ({self._column("input"), self._column("history")} if start else set()))
        prompt = self.with_system(asked, row)
        chosen, rejected = (messages_of(turns) for turns in answers)
        return Pair(messages_of(prompt), chosen, rejected, list(dict.fromkeys(self.remarks)))

    def marked(self, row: Mapping[str, Any]) -> Marked:
        label = self.data.label_columns[0]
        if _is_generation(row):
            desirable, row = _generation_mark(row), self._without_ignored(row)
            asked = self._text_or_turns(row, "prompt", "user", 0)
            answer = [Turn("assistant", self._text(row, GENERATED))]
            self._remark(row, {"prompt", GENERATED, MARK, *GENERATION_COLUMNS})
            column = GENERATED
        else:
            desirable = _mark(row.get(label), label)
            kind = format_of(row, self.data.format, _instruction_columns(self.data))
            rest = {name: value for name, value in row.items() if name != label}
            conversation = self.read_row(rest, kind)
            column = self._column({"alpaca": "output", "prompt_completion": "completion"}.get(kind, PROMPTS[kind]))
            turns = [Turn(turn["role"], turn["content"]) for turn in conversation.messages]
            if turns[-1].role != "assistant":
                raise DataError("the last turn must be the assistant's, the answer that is judged", column=column)
            asked, answer = turns[:-1], turns[-1:]
        _check_answer(asked, answer, column)
        prompt = self.with_system(asked, {} if column != GENERATED else row)
        return Marked(messages_of(prompt), messages_of(answer), desirable, list(dict.fromkeys(self.remarks)))

    def _asked(self, row: Mapping[str, Any]) -> tuple[list[Turn], str | None]:
        """The turns before the answers, and their column; nothing where the answers hold them."""
        wanted = PROMPTS if self.data.format == "auto" else {self.data.format: PROMPTS[self.data.format]}
        for name in wanted.values():
            column = self._column(name)
            if row.get(column) is None:
                continue
            if name == "instruction":
                return self._question(row), column
            history = self._history(row) if name == "prompt" else []
            return [*history, *self._text_or_turns(row, column, "user", len(history))], column
        return [], None

    def _check_asked(self, asked: list[Turn], shared: list[Turn], column: str | None, names: Sequence[str]) -> None:
        """Raises DataError where the answers are whole conversations and the row's prompt is not what they share."""
        if not shared:
            message = f"{names[0]} and {names[1]} are whole conversations that do not begin alike; give both one prompt"
            raise DataError(message, column=names[1])
        own = [turn.content.strip() for turn in shared]
        if any(turn.content.strip() not in own for turn in asked):
            message = f"holds another prompt than the conversations in {names[0]} and {names[1]} begin with"
            raise DataError(f"{message}; take one of them out, or set data.ignore='[{column}]'", column=column)

    def _remark(self, row: Mapping[str, Any], read: set[str]) -> None:
        """Remarks on columns that hold something and are not read."""
        read = read | {self._column("system")}
        for name, value in row.items():
            if name not in read and not name.startswith("_") and value not in (None, "", []):
                self.remarks.append(("not_used", name))


def _shared(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> list[Turn]:
    """What two conversations begin with, up to the last turn of the user's that both have."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    while same and (chosen[same - 1].role != "user" or same in (len(chosen), len(rejected))):
        same -= 1
    return [*chosen[:same]]


def _check_answer(asked: list[Turn], turns: list[Turn], column: str) -> None:
    """Raises DataError for an answer without text, or turns that do not follow one another."""
    if not asked or all(turn.role == "system" for turn in asked):
        raise DataError("there is no question of the user's before the answer", column=column)
    check_order([*asked, *turns], column)
    if turns[-1].role != "assistant":
        raise DataError(f"the last turn is the {turns[-1].role}'s; end with the assistant's answer", column=column)
    if any(turn.role == "assistant" and not turn.content.strip() for turn in turns):
        raise DataError("the answer is empty; fill it, or set data.cleaning.empty=drop", column=column)


def _instruction_columns(data: DataConfig) -> dict[str, str]:
    return {ours: theirs for ours, theirs in data.columns.items() if ours in INSTRUCTION_NAMES}


def _is_generation(names: Iterable[str]) -> bool:
    return {GENERATED, MARK} <= {*names}


def _generation_mark(row: Mapping[str, Any]) -> bool:
    if row[MARK] is None:
        command = "`peftkit inspect --marked FILE --bad --out rows.jsonl`"
        raise DataError(f"this generation has no mark; mark it, or keep the marked ones with {command}", column=MARK)
    return _mark(row[MARK], MARK)


def _mark(value: Any, column: str) -> bool:
    """Whether an answer is good; raises DataError for anything but a mark."""
    text = str(int(value)) if isinstance(value, float) and value in (0.0, 1.0) else str(value)
    if (known := MARKS.get(text.strip().lower())) is not None:
        return known
    shown = "nothing (null)" if value is None else repr(value)
    raise DataError(f"expected true or false, good or bad, 1 or 0, found {shown}", column=column)
