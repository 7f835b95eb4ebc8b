"""What one label cell spells: the rule table that every file format, training and ``evaluate --file`` share.

CSV holds text, JSON, Parquet and Excel hold values; ``kind_of`` gives both the same kind, and ``class_names`` the same
names. How the kinds of a whole column decide what is learned stands in ``peftkit.tasks.label_column``.
"""

from __future__ import annotations

import ast
import json
import math
import re
import unicodedata
from collections.abc import Collection, Iterable
from decimal import Decimal
from typing import Any, Literal, get_args

Kind = Literal["missing", "flag", "whole", "decimal", "formatted", "code", "list", "object", "word"]
"""
missing: only a word for a missing value;  flag: true or false;  whole: 3, 3.0;  decimal: 0.5, 1e-05;
formatted: a number that a person formatted: 0,5, 1,000, 5%;  code: digits that no number keeps: 007, 1e5, 1_0, 1.2.3;
list: several labels, [0, 1] or ["a"];  object: named values, {"a": 1};  word: anything else.
"""
SPELLINGS: tuple[tuple[Kind, str], ...] = (
    ("missing", r"(?i:-?nan|null|none|nil|n/?a|#n/?a|<na>|nat)"),
    ("flag", r"(?i:true|false)"),
    ("whole", r"-?(0|[1-9][0-9]*)(\.0+)?"),
    ("decimal", r"[-+]?((0|[1-9][0-9]*)?\.[0-9]+([eE][-+]?[0-9]+)?|[1-9][0-9]*[eE][-+][0-9]+)"),
    ("formatted", r"[-+]?[0-9]+([.,][0-9]{3})*(,[0-9]+)(\.[0-9]+)?|[-+]?[0-9]+([.,][0-9]+)? ?%"),
    ("code", r"[0-9]+([._eE][0-9]+)*"),
)
"""The first pattern that fits all of a text is its kind."""
SEPARATORS = ("|", ";", ",")
"""What may stand between several labels of one cell."""
YES = {"1": 1, "0": 0, "true": 1, "false": 0, "yes": 1, "no": 0}
"""Spellings of the cells of several 0/1 columns; numbers as ``whole_number`` reads them."""
_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in SPELLINGS)
_THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(,[0-9]{3})+")
assert {kind for kind, _ in SPELLINGS} < {*get_args(Kind)}


def kind_of(value: Any) -> Kind:
    """The kind of a cell: of text by its spelling, of other values by their type."""
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, int | float | Decimal):
        return "whole" if whole_number(value) is not None else "decimal" if math.isfinite(value) else "word"
    if not isinstance(value, str):
        return "object" if isinstance(value, dict) else "list"
    text = value.strip()
    if text[:1] in ("[", "(", "{") and (parsed := parse(text)) is not None:
        return "object" if isinstance(parsed, dict) else "list"
    return next((kind for kind, pattern in _PATTERNS if pattern.fullmatch(text)), "word")


def parse(text: str) -> list[Any] | dict[Any, Any] | None:
    """The list or mapping that a text spells in JSON or Python: ``["a"]``, ``['a', 'b']``, ``(1, 0)``; else None."""
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "()", "{}"):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        if isinstance(value, list | tuple | set):
            return sorted(value, key=str) if isinstance(value, set) else list(value)
        return value if isinstance(value, dict) else None
    return None


def whole_number(value: Any) -> int | None:
    """The integer that a label spells (3, 3.0, "3", "3.0"; not "03"), or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if _pattern("whole").fullmatch(text) else None
    if isinstance(value, int):
        return value
    finite = isinstance(value, float | Decimal) and math.isfinite(value)
    return int(value) if finite and value == int(value) else None


def indicator(value: Any) -> int | None:
    """The 0 or 1 that a cell spells (0, 1.0, True, "yes", "FALSE"), or None."""
    if isinstance(value, bool):
        return int(value)
    whole = whole_number(value)
    return YES.get(value.strip().casefold() if isinstance(value, str) and whole is None else str(whole))


def number(value: Any) -> float | None:
    """The finite number that a label spells, with a decimal point or an unambiguous decimal comma; or None.

    "1,250" may be 1.25 or 1250, and "1_0" is no number: both are None.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    if isinstance(value, str):
        text = value.strip()
        value = text.replace(",", ".") if text.count(",") == 1 and not _THOUSANDS.fullmatch(text) else text
        if "_" in value:
            return None
    try:
        spelled = float(value)
    except (ValueError, OverflowError):
        return None
    return spelled if math.isfinite(spelled) else None


def text_of(value: Any) -> str:
    """A cell as it is written: without spaces around it, True as "True"."""
    return value.strip() if isinstance(value, str) else str(value)


def name_of(value: Any) -> str:
    """The class name that a label gets among labels of its kind: "World", 2.0 → "2", "2.0" → "2", "TRUE" → "True"."""
    whole = whole_number(value)
    if whole is not None:
        return str(whole)
    text = text_of(value)
    return text.capitalize() if _pattern("flag").fullmatch(text) else text


def class_names(values: Collection[Any]) -> tuple[str, ...]:
    """Class names in id order: numbers by size, others by alphabet.

    Where all labels are plain numbers, or all are true and false, 2.0 and "2" are one class; elsewhere they are as
    written, as "2.0" among the versions "1.9" and "1.10".
    """
    plain = {kind_of(value) for value in values} in ({"whole"}, {"whole", "decimal"}, {"decimal"}, {"flag"})
    names = {name_of(value) if plain and not are_versions(values) else text_of(value) for value in values}
    numeric = all(kind_of(name) in ("whole", "decimal") for name in names)
    return tuple(sorted(names, key=(lambda name: (float(name), name)) if numeric else None))


def are_versions(values: Iterable[Any]) -> bool:
    """Whether decimals are versions ("1.9", "1.10"): a last zero counts, and they do not all have as many digits."""
    fractions = [text_of(value).partition(".")[2] for value in values if kind_of(value) in ("whole", "decimal")]
    digits = {len(fraction) for fraction in fractions if fraction}
    return len(digits) > 1 and any(len(fraction) > 1 and fraction.endswith("0") for fraction in fractions)


def fold(name: str) -> str:
    """A class name without what the eye hardly sees: case, spacing, and the form of Unicode (NFC, NFD)."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def split_labels(text: str, separator: str) -> list[Any]:
    """The labels of a cell, "a; b" → ["a", "b"], or those of a list that it spells: "[]" has none."""
    parsed = parse(text)
    if isinstance(parsed, list):
        return parsed
    return [piece for part in text.split(separator) if (piece := part.strip())]


def _pattern(kind: Kind) -> re.Pattern[str]:
    return dict(_PATTERNS)[kind]
