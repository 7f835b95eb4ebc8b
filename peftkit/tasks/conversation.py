"""Instruction data in its four usual shapes, read as one: a list of messages with roles and text.

    alpaca             {"instruction": "Translate.", "input": "chat", "output": "cat"}      (+ "system")
    sharegpt           {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    messages           {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    prompt_completion  {"prompt": "Hi", "completion": "Hello"}                               (or lists of messages)

Alpaca's user turn is the instruction, then a blank line and the input where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from peftkit.errors import DataError, RecipeError, did_you_mean

Message = dict[str, str]
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
COLUMNS = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}
OPTIONAL = ("input", "system")
TURN_KEYS = (("role", "content"), ("from", "value"))


def format_of(names: Iterable[str], wanted: str, columns: Mapping[str, str]) -> str:
    """The format of rows with these columns; "auto" is the first format all of whose columns are there.

    Args:
        columns: ``data.columns``, our name → the source's.

    Raises:
        RecipeError: ``data.columns`` renames something that no format has.
        DataError: no format fits, or a column of the wanted one is missing.
    """
    names = list(names)
    ours = {name for needed in COLUMNS.values() for name in needed} | set(OPTIONAL)
    for name in columns:
        if name not in ours:
            raise RecipeError(f"data.columns: '{name}' is no field of instruction rows: {did_you_mean(name, ours)}")
    for candidate, needed in COLUMNS.items() if wanted == "auto" else [(wanted, COLUMNS[wanted])]:
        missing = [columns.get(name, name) for name in needed if columns.get(name, name) not in names]
        if not missing:
            return candidate
    if wanted == "auto":
        known = "; ".join(f"{candidate}: {', '.join(needed)}" for candidate, needed in COLUMNS.items())
        raise DataError(
            f"expected the columns of one of the instruction formats ({known}), found {_listed(names)}; "
            "name yours with data.columns, such as data.columns.instruction=question data.columns.output=answer"
        )
    near = did_you_mean(missing[0], names)
    raise DataError(f"data.format={wanted} needs this column, found {_listed(names)}: {near}", column=missing[0])


def read_row(row: Mapping[str, Any], kind: str, columns: Mapping[str, str], system: str | None) -> list[Message]:
    """One row of the given format as checked messages; raises DataError that names the turn, counted from 1."""
    column = columns.get(COLUMNS[kind][0], COLUMNS[kind][0])
    if kind == "alpaca":
        messages = _question(row, columns)
        messages.append({"role": "assistant", "content": _text(row, columns.get("output", "output"))})
    elif kind == "prompt_completion":
        messages = _prompt_completion(row, columns)
    else:
        messages = _turns(row.get(column), column)
    _check_order(messages, column)
    if all(message["role"] != "assistant" for message in messages):
        raise DataError("the conversation has no assistant turn, so nothing can be learned from it", column=column)
    messages = _with_system(messages, system)
    if messages[0]["role"] == "assistant":
        problem = "the assistant's, so there is nothing that it answers; begin with the user's, or set data.system"
        raise DataError(f"turn 1: {problem}", column=column)
    return messages


def read_open(value: Any, column: str, system: str | None = None) -> list[Message]:
    """Turns that await an answer; raises DataError that names the turn, counted from 1."""
    messages = _turns(value, column)
    _check_order(messages, column)
    last = messages[-1]["role"]
    if last != "user":
        problem = f"the {last}'s; the last turn must be the user's, to be answered"
        raise DataError(f"turn {len(messages)}: {problem}", column=column)
    return _with_system(messages, system)


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The turns with the system prompt before them, where they have none of their own."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def read_prompt(row: Mapping[str, Any], columns: Mapping[str, str], text: str) -> str | list[Message]:
    """What is to be continued or answered in a row of any format; an answer that is there already is left out.

    Args:
        columns: ``data.columns``, our name → the source's.
        text: a further column that may hold the prompt.

    Raises:
        DataError: none of these columns is there, or what it holds is wrong; names the column and the turn.
    """
    for name in ("messages", "conversations"):
        column = columns.get(name, name)
        if row.get(column) is not None:
            turns = _turns(row[column], column)
            return read_open(turns[:-1] if len(turns) > 1 and turns[-1]["role"] == "assistant" else turns, column)
    if row.get(columns.get("instruction", "instruction")) is not None:
        return _question(row, columns)
    for column in (columns.get("prompt", "prompt"), text):
        if row.get(column) is not None:
            return row[column] if isinstance(row[column], str) else read_open(row[column], column)
    raise DataError(f"expected prompt, messages, or instruction (and input), found {_listed(row) or 'nothing'}")


def _question(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    """The turns before Alpaca's answer."""
    instruction = _text(row, columns.get("instruction", "instruction"))
    extra, system = (_text(row, columns.get(name, name), optional=True) for name in OPTIONAL)
    asked = f"{instruction}\n\n{extra}" if extra.strip() and instruction.strip() else instruction or extra
    start = [{"role": "system", "content": system}] if system.strip() else []
    return [*start, {"role": "user", "content": asked}]


def _prompt_completion(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    messages: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        column = columns.get(name, name)
        if isinstance(row.get(column), str) or row.get(column) is None:
            messages.append({"role": role, "content": _text(row, column)})
        else:
            messages += _turns(row[column], column, start=len(messages))
    return messages


def _turns(value: Any, column: str, start: int = 0) -> list[Message]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise DataError(f"expected a list of turns, found {_named(value)}", column=column)
    if not value:
        raise DataError("the conversation is empty; give it a user's and an assistant's turn", column=column)
    return [_turn(item, number, column) for number, item in enumerate(value, start + 1)]


def _turn(item: Any, number: int, column: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"turn {number}: expected a mapping with role and content, found {_named(item)}", column=column)
    present = [key for key, value in item.items() if value is not None]
    keys = next((pair for pair in TURN_KEYS if {*pair} <= {*present}), None)
    if keys is None:
        expected = "expected role and content (or from and value)"
        raise DataError(f"turn {number}: {expected}, found {_listed(present) or 'nothing'}", column=column)
    role, content = (item[key] for key in keys)
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        raise DataError(f"turn {number}: unknown role {role!r}: {did_you_mean(str(role), ROLES)}", column=column)
    if not isinstance(content, str):
        raise DataError(f"turn {number}: expected text, found {_named(content)}", column=column)
    return {"role": ROLES[role.strip().lower()], "content": content}


def _check_order(messages: Sequence[Message], column: str) -> None:
    roles = [message["role"] for message in messages]
    for number, (before, role) in enumerate(pairwise(roles), 1):
        if role == before:
            both = f"turns {number} and {number + 1} are both the {role}'s"
            raise DataError(f"{both}; join them into one, or take one out", column=column)
        if role == "system":
            raise DataError(f"turn {number + 1}: the system prompt must be the first turn", column=column)


def _text(row: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        if column not in row:
            raise DataError(f"missing in this row, found {_listed(row)}: {did_you_mean(column, row)}", column=column)
        raise DataError(f"expected text, found {_named(value)}", column=column)
    return value


def _named(value: Any) -> str:
    return "nothing (null)" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(str(name) for name in names if not str(name).startswith("_"))
