"""Instruction data in its four usual shapes, read as one: a list of messages with roles and text.

    alpaca             {"instruction": "Translate.", "input": "chat", "output": "cat"}      (+ "history")
    sharegpt           {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    messages           {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    prompt_completion  {"prompt": "Hi", "completion": "Hello"}                               (or lists of messages)

Any of them may have a ``system`` column. Alpaca's user turn is the instruction, then a blank line and the input where
there is one; ``history`` holds earlier [question, answer] pairs. Lists may also be written as text (JSON, or as Python
prints them), as they are in a CSV cell. A turn that is flagged (``"loss": false``) is read, and not learned.

Nothing is dropped in silence: what is not read is a remark, and what would change an answer (``LOST``) is an error,
unless ``data.ignore`` names it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from peftkit.errors import DataError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from peftkit.schema.recipe import DataConfig

Message = dict[str, str]
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant",
}  # fmt: skip
TOOL_ROLES = frozenset({"tool", "function", "function_call", "tool_call", "function_response", "tool_response",
                        "observation", "ipython"})  # fmt: skip
"""Roles of calls and of their results, which are not read yet."""
COLUMNS = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}
OPTIONAL = {
    "alpaca": ("input", "system", "history"),
    "sharegpt": ("system",),
    "messages": ("system",),
    "prompt_completion": ("system", "history"),
}
NAMES = frozenset(name for names in (*COLUMNS.values(), *OPTIONAL.values()) for name in names)
"""Every column that a format has."""
OTHER_NAMES = {"system_prompt": "system", "system_message": "system", "context": "input", "chat_history": "history"}
"""What data sets also call an optional column → its name here, for a hint."""
QUESTIONS = ("instruction", "question", "prompt", "query")
ANSWERS = ("output", "answer", "response", "completion", "chosen")
"""What data sets call the columns of a question and its answer, the likeliest first."""
TURN_KEYS = (("role", "content"), ("from", "value"))
FLAGS = ("loss", "train", "weight")
"""Keys of a turn that say whether it is learned."""
LOST = {
    "tool_calls": "calls", "function_call": "a call",
    "reasoning_content": "reasoning", "reasoning": "reasoning", "thinking": "reasoning",
}  # fmt: skip
"""Keys of a turn, or columns, without which the model would learn another answer than the data's."""
ABSENT_WORDS = frozenset({"nan", "null", "none", "n/a", "na", "<na>"})
"""Texts, in lower case, that tables hold where there was none."""


@dataclass(frozen=True)
class Conversation:
    """One row."""

    messages: list[Message]
    flags: list[bool | None]
    """Whether each turn is to be learned, where the row says so."""
    remarks: list[tuple[str, str]]
    """(cleaning step, detail) of what the user should know about how the row was read."""

    @property
    def masked(self) -> list[int]:
        """Indexes of the answers that are not to be learned."""
        roles = [message["role"] for message in self.messages]
        return [index for index, flag in enumerate(self.flags) if flag is False and roles[index] == "assistant"]


@dataclass(frozen=True)
class Turn:
    role: str
    content: str
    learned: bool | None = None


def format_of(names: Iterable[str], wanted: str, columns: Mapping[str, str]) -> str:
    """The format of rows with these columns; "auto" is the first format all of whose columns are there.

    Args:
        columns: ``data.columns``, our name → the source's.

    Raises:
        RecipeError: ``data.columns`` renames something that no format has.
        DataError: no format fits, or a column of the wanted one is missing.
    """
    names = list(names)
    for name in columns:
        if name not in NAMES:
            raise RecipeError(f"data.columns: '{name}' is no field of instruction rows: {did_you_mean(name, NAMES)}")
    for candidate, needed in COLUMNS.items() if wanted == "auto" else [(wanted, COLUMNS[wanted])]:
        missing = [columns.get(name, name) for name in needed if columns.get(name, name) not in names]
        if not missing:
            return candidate
    if wanted == "auto":
        known = "; ".join(f"{candidate}: {', '.join(needed)}" for candidate, needed in COLUMNS.items())
        raise DataError(
            f"expected the columns of one of the instruction formats ({known}), found {_listed(names)}; "
            f"{_suggestion(names)}"
        )
    near = did_you_mean(missing[0], names)
    raise DataError(f"data.format={wanted} needs this column, found {_listed(names)}: {near}", column=missing[0])


def _suggestion(names: Sequence[str]) -> str:
    """What to set so that these columns are read, where their names tell."""
    question = next((name for name in QUESTIONS if name in names), None)
    answer = next((name for name in ANSWERS if name in names), None)
    if question is None or answer is None:
        plain = "; task.kind=style learns a column of plain text" if "text" in names else ""
        example = "data.columns.instruction=question data.columns.output=answer"
        return f"name yours with data.columns, such as {example}{plain}"
    chosen = {"instruction": question, "output": answer}
    chosen |= {ours: theirs for theirs, ours in OTHER_NAMES.items() if theirs in names}
    fields = " ".join(f"data.columns.{ours}={theirs}" for ours, theirs in chosen.items() if ours != theirs)
    return f"set {fields}, if these are the question and its answer"


def check_columns(names: Iterable[str], columns: Mapping[str, str]) -> None:
    """Raises DataError when ``data.columns`` names a column that no split has."""
    names = [name for name in names if not name.startswith("_")]
    for ours, theirs in columns.items():
        if theirs not in names:
            near = did_you_mean(theirs, names)
            raise DataError(f"data.columns.{ours} names this column, which is not there: {near}", column=theirs)


def read_row(row: Mapping[str, Any], kind: str, data: DataConfig) -> Conversation:
    """One row of the given format, checked; raises DataError that names the column and the turn, counted from 1."""
    return RowReader(data).read_row(row, kind)


def read_open(value: Any, column: str, data: DataConfig) -> list[Message]:
    """Turns that await an answer, under the recipe's system prompt where they have none.

    Raises DataError that names the turn, counted from 1.
    """
    reader = RowReader(data)
    return messages_of(reader.with_system(check_open(reader.turns(value, column), column), {}))


def read_prompt(row: Mapping[str, Any], data: DataConfig) -> str | list[Message]:
    """What is to be continued or answered in a row of any format, or in its column ``data.text``.

    An answer that is there already is left out, and the recipe's system prompt is not added.

    Raises:
        DataError: none of these columns is there, or what it holds is wrong; names the column and the turn.
    """
    return RowReader(data.model_copy(update={"system": None})).read_prompt(row)


class RowReader:
    """Reads one row under a recipe's ``data`` section, and collects remarks on it."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.remarks: list[tuple[str, str]] = []

    def read_row(self, row: Mapping[str, Any], kind: str) -> Conversation:
        row, column = self._without_ignored(row), self._column(COLUMNS[kind][0])
        if kind == "alpaca":
            answer = self._text(row, self._column("output"))
            turns = [*self._question(row), Turn("assistant", answer)]
        elif kind == "prompt_completion":
            turns = self._history(row)
            for name, role in (("prompt", "user"), ("completion", "assistant")):
                turns += self._text_or_turns(row, self._column(name), role, len(turns))
        else:
            turns = self.turns(row.get(column), column)
        check_order(turns, column)
        if all(turn.role != "assistant" for turn in turns):
            raise DataError("the conversation has no assistant turn, so nothing can be learned from it", column=column)
        if turns[-1].role != "assistant":
            self.remarks.append(("unanswered_turns", ""))
        turns = self.with_system(turns, row)
        if turns[0].role == "assistant":
            problem = "the assistant's, so there is nothing that it answers; begin with the user's, or set data.system"
            raise DataError(f"turn 1: {problem}", column=column)
        self._remark_on_unread(row, kind)
        return Conversation(messages_of(turns), [turn.learned for turn in turns], list(dict.fromkeys(self.remarks)))

    def read_prompt(self, row: Mapping[str, Any]) -> str | list[Message]:
        row = self._without_ignored(row)
        for name in ("messages", "conversations"):
            column = self._column(name)
            if row.get(column) is not None:
                turns = self.turns(row[column], column)
                turns = turns[:-1] if len(turns) > 1 and turns[-1].role == "assistant" else turns
                return messages_of(self.with_system(check_open(turns, column), row))
        if row.get(self._column("instruction")) is not None:
            return messages_of(self.with_system(self._question(row), row))
        for column in (self._column("prompt"), self.data.text):
            if row.get(column) is not None:
                history = self._history(row)
                turns = [*history, *self._text_or_turns(row, column, "user", len(history))]
                asked = self.with_system(check_open(turns, column), row)
                is_text = isinstance(row[column], str) and asked == [Turn("user", row[column])]
                return row[column] if is_text else messages_of(asked)
        raise DataError(f"expected prompt, messages, or instruction (and input), found {_listed(row) or 'nothing'}")

    def turns(self, value: Any, column: str, start: int = 0) -> list[Turn]:
        """A list of turns, or the text of one; ``start`` turns stand before it."""
        value = _parsed(value) if isinstance(value, str) else value
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            raise DataError(f"expected a list of turns, found {_named(value)}", column=column)
        if not value:
            raise DataError("the conversation is empty; give it a user's and an assistant's turn", column=column)
        return [self._turn(item, number, column) for number, item in enumerate(value, start + 1)]

    def with_system(self, turns: list[Turn], row: Mapping[str, Any]) -> list[Turn]:
        """The turns with the row's system prompt before them, or the recipe's, where they have none of their own."""
        column = self._column("system")
        system = self._optional_text(row, column)
        has_own = turns[0].role == "system"
        if has_own and system.strip() and turns[0].content.strip() != system.strip():
            hint = f"take one of them out, or set data.ignore='[{column}]'"
            raise DataError(f"holds another system prompt than the conversation's first turn; {hint}", column=column)
        if has_own:
            return turns
        if system.strip():
            return [Turn("system", system), *turns]
        return turns if self.data.system is None else [Turn("system", self.data.system), *turns]

    def _column(self, name: str) -> str:
        return self.data.columns.get(name, name)

    def _without_ignored(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: value for name, value in row.items() if name not in self.data.ignore}

    def _question(self, row: Mapping[str, Any]) -> list[Turn]:
        """The turns before Alpaca's answer, without the system prompt."""
        instruction = self._text(row, self._column("instruction"))
        extra = self._optional_text(row, self._column("input"))
        asked = f"{instruction}\n\n{extra}" if extra.strip() and instruction.strip() else instruction or extra
        return [*self._history(row), Turn("user", asked)]

    def _history(self, row: Mapping[str, Any]) -> list[Turn]:
        """Earlier questions and answers: pairs of texts, or turns."""
        column = self._column("history")
        value = row.get(column)
        value = _parsed(value) if isinstance(value, str) else value
        if not _holds(value):
            return []
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            raise DataError(f"expected a list of [question, answer] pairs, found {_named(value)}", column=column)
        if isinstance(value[0], Mapping):
            return self.turns(value, column)
        turns = []
        for number, pair in enumerate(value, 1):
            is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
            if not is_pair or not all(isinstance(text, str) for text in pair):
                raise DataError(f"pair {number}: expected [question, answer], found {_named(pair)}", column=column)
            turns += [Turn(role, _checked(text, column)) for role, text in zip(("user", "assistant"), pair)]
        return turns

    def _text_or_turns(self, row: Mapping[str, Any], column: str, role: str, start: int) -> list[Turn]:
        """A text as a turn of ``role``, or turns; also those that were written as text into a table's cell."""
        value = row.get(column)
        if isinstance(value, str) and _are_turns(parsed := _parsed(value)):
            self.remarks.append(("turns_in_text", column))
            value = parsed
        if value is None or isinstance(value, (str, int, float)):
            return [Turn(role, self._text(row, column))]
        return self.turns(value, column, start)

    def _turn(self, item: Any, number: int, column: str) -> Turn:
        if not isinstance(item, Mapping):
            message = f"turn {number}: expected a mapping with role and content, found {_named(item)}"
            raise DataError(message, column=column)
        # a column of a table has one type, in which keys that a turn lacks are null
        present = {key: value for key, value in self._without_ignored(item).items() if value is not None}
        for key, what in LOST.items():
            if _holds(present.get(key)):
                raise _lost(key, what, column, f"turn {number}: ")
        keys = next((pair for pair in TURN_KEYS if {*pair} <= {*present}), None)
        if keys is None:
            expected = "expected role and content (or from and value)"
            raise DataError(f"turn {number}: {expected}, found {_listed(present) or 'nothing'}", column=column)
        for key, value in present.items():
            if key not in (*keys, *FLAGS, *LOST) and _holds(value):
                self.remarks.append(("not_used", f"{column}[].{key}"))
        role = self._role(present[keys[0]], number, column)
        content = self._content(present[keys[1]], number, column)
        return Turn(role, content, _flag(present, number, column))

    def _role(self, role: Any, number: int, column: str) -> str:
        name = role.strip().lower() if isinstance(role, str) else ""
        if name in ROLES:
            return ROLES[name]
        if name in TOOL_ROLES:
            problem = f"role {role!r}: calls of tools and their results are not read yet"
            raise DataError(f"turn {number}: {problem}; take these rows out", column=column)
        raise DataError(f"turn {number}: unknown role {role!r}: {did_you_mean(str(role), ROLES)}", column=column)

    def _content(self, value: Any, number: int, column: str) -> str:
        """A turn's text, or the texts of its parts one after the other, which is how templates write them."""
        if isinstance(value, str):
            return _checked(value, column, number)
        if not isinstance(value, Sequence) or not value or not all(isinstance(part, Mapping) for part in value):
            raise DataError(f"turn {number}: expected text, found {_named(value)}", column=column)
        for place, part in enumerate(value, 1):
            kind = part.get("type") or "text"
            if kind != "text" or not isinstance(part.get("text"), str):
                problem = f"part {place} of the content is {kind!r}, and only text can be read"
                raise DataError(f"turn {number}: {problem}; take these rows out", column=column)
            for key, other in self._without_ignored(part).items():
                if key not in ("type", "text") and _holds(other):
                    self.remarks.append(("not_used", f"{column}[].content[].{key}"))
        return _checked("".join(part["text"] for part in value), column, number)

    def _text(self, row: Mapping[str, Any], column: str) -> str:
        value = row.get(column)
        if isinstance(value, str):
            return _checked(value, column)
        if column not in row:
            raise DataError(f"missing in this row, found {_listed(row)}: {did_you_mean(column, row)}", column=column)
        if not _holds(value):
            raise DataError("expected text, found nothing (null)", column=column)
        hint = "; write it as text" if isinstance(value, (int, float)) else ""
        raise DataError(f"expected text, found {_named(value)}{hint}", column=column)

    def _optional_text(self, row: Mapping[str, Any], column: str) -> str:
        if not _holds(row.get(column)):
            return ""
        text = self._text(row, column)
        if text.strip().lower() in ABSENT_WORDS:
            self.remarks.append(("null_words", f"{column}={text.strip()}"))
        return text

    def _remark_on_unread(self, row: Mapping[str, Any], kind: str) -> None:
        """Remarks on columns that are not read; raises DataError for one without which another answer is learned."""
        read = {self._column(name) for name in (*COLUMNS[kind], *OPTIONAL[kind])}
        for name, value in row.items():
            if name in read or name.startswith("_") or not _holds(value):
                continue
            if name in LOST:
                raise _lost(name, LOST[name], name, "")
            ours = OTHER_NAMES.get(name)
            hint = f" (data.columns.{ours}={name} reads it)" if ours in OPTIONAL[kind] else ""
            self.remarks.append(("not_used", f"{name}{hint}"))


def messages_of(turns: Iterable[Turn]) -> list[Message]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _flag(turn: Mapping[str, Any], number: int, column: str) -> bool | None:
    """What the flags of a turn say: learned or not; None where there are none."""
    flags = {key: turn[key] for key in FLAGS if key in turn and turn[key] == turn[key]}  # tables hold NaN for none
    for key, value in flags.items():
        if isinstance(value, str) or value not in (0, 1):
            expected = f"expected true, false, 1 or 0 for '{key}', found {_named(value)}"
            hint = f"a turn is learned or it is not; set data.ignore='[{key}]' to learn it like the others"
            raise DataError(f"turn {number}: {expected}; {hint}", column=column)
    if len(values := {bool(value) for value in flags.values()}) > 1:
        raise DataError(f"turn {number}: {' and '.join(flags)} contradict each other; keep one", column=column)
    return values.pop() if values else None


def check_order(turns: Sequence[Turn], column: str) -> None:
    roles = [turn.role for turn in turns]
    for number, (before, role) in enumerate(pairwise(roles), 1):
        if role == before:
            both = f"turns {number} and {number + 1} are both the {role}'s"
            raise DataError(f"{both}; join them into one, or take one out", column=column)
        if role == "system":
            raise DataError(f"turn {number + 1}: the system prompt must be the first turn", column=column)


def check_open(turns: list[Turn], column: str) -> list[Turn]:
    """The turns; raises DataError where they do not await an answer."""
    check_order(turns, column)
    if turns[-1].role != "user":
        problem = f"the {turns[-1].role}'s; the last turn must be the user's, to be answered"
        raise DataError(f"turn {len(turns)}: {problem}", column=column)
    return turns


def _lost(key: str, what: str, column: str, where: str) -> DataError:
    problem = f"'{key}' is not read yet, and without it the model would learn another answer"
    hint = f"write the {what.removeprefix('a ')} into the answer's text as the model's template does"
    return DataError(f"{where}{problem}; {hint}, or leave it out with data.ignore='[{key}]'", column=column)


def _checked(text: str, column: str, number: int = 0) -> str:
    """The text; raises DataError for half a surrogate pair, which no tokenizer can read."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"turn {number}: " if number else ""
            half = f"\\u{ord(text[error.start]):04x} at character {error.start + 1}"
            raise DataError(f"{where}{half} is half of a character; mend or remove it", column=column) from None
    return text


def _parsed(text: str) -> Any:
    """The list that a text writes out, as JSON or as Python prints it; else the text."""
    if not text.lstrip().startswith("["):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _are_turns(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
    return is_list and all(any({*pair} <= {*item} for pair in TURN_KEYS) for item in value)


def _holds(value: Any) -> bool:
    """Whether there is anything in a value: null, NaN, blank texts and empty lists or mappings of such hold nothing."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds, value))
    return value is not None and bool(value == value)


def _named(value: Any) -> str:
    return "nothing (null)" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(str(name) for name in names if not str(name).startswith("_"))
