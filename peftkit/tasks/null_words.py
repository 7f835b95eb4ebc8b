"""Labels that are only words for a missing value ("nan", "N/A"): in cells of every kind, and the rows without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftkit.tasks import label_spelling as spelling

if TYPE_CHECKING:
    import pyarrow as pa


def is_null_word(value: Any) -> bool:
    """Whether a cell is only a word for a missing value, such as "nan" or "N/A"."""
    return isinstance(value, str) and spelling.kind_of(value) == "missing"


def has_null_word(value: Any, separator: str | None = None) -> bool:
    """Whether a cell is such a word, or one of several labels in it is; ``separator`` is ``data.label_separator``."""
    if isinstance(value, str) and not is_null_word(value):
        joined = separator is not None and separator in value
        value = spelling.split_labels(value, separator or ",") if joined or spelling.parse(value) else value
    return any(map(is_null_word, value)) if isinstance(value, list | tuple) else is_null_word(value)


def without_null_words(table: pa.Table, columns: Sequence[str], separator: str | None) -> pa.Table:
    """The rows of a table in whose label columns there is no such word."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in columns:
        column = table.column(name).combine_chunks()
        if pa.types.is_string(column.type):
            words = [word for word in pc.unique(column).to_pylist() if has_null_word(word, separator)]
            table = table.filter(pc.invert(pc.is_in(column, pa.array(words, pa.string()))))
        elif pa.types.is_list(column.type) and pa.types.is_string(column.type.value_type):
            table = table.filter(pa.array([not has_null_word(value) for value in column.to_pylist()], pa.bool_()))
    return table
