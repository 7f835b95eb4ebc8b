"""What is wrong with a recipe's values, one line per field."""

from __future__ import annotations

import reprlib
from typing import Any

from pydantic import ValidationError

_SHORT = reprlib.Repr()  # bounded: aliases can make a small file stand for an endless value
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 61


def flatten(error: ValidationError, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], str, Any]]:
    """(location, message, input) of every complaint, those of parts chosen by kind included."""
    complaints = []
    for item in error.errors(include_url=False):
        inner = item.get("ctx", {}).get("error")
        loc = prefix + tuple(part for part in item["loc"] if not _is_union_tag(part))
        if isinstance(inner, ValidationError):
            complaints += flatten(inner, loc)
        else:
            complaints.append((loc, item["msg"].removeprefix("Value error, "), item.get("input")))
    return complaints


def describe(error: ValidationError, origin: str) -> str:
    """One line for one complaint, a short list for several."""
    lines = list(dict.fromkeys(complaint(*one) for one in flatten(error)))
    if len(lines) == 1:
        return f"{origin}: {lines[0]}"
    return "\n  ".join([f"{origin}: {len(lines)} fields are wrong", *lines])


def complaint(loc: tuple[Any, ...], message: str, value: Any) -> str:
    """``training.epochs: input should be greater than 0, found -1``."""
    message = message[:1].lower() + message[1:]
    shown = _SHORT.repr(value)
    if not isinstance(value, dict) and len(shown) <= 60 and "unknown field" not in message:
        message += f", found {shown}"
    where = ".".join(str(part) for part in loc)
    return f"{where}: {message}" if where else message


def _is_union_tag(part: Any) -> bool:
    """pydantic puts the tried type of a union into the location; users know fields only."""
    return isinstance(part, str) and (
        not part.isidentifier() or part in {"int", "str", "float", "none", "tuple", "dict"}
    )
