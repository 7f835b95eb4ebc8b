"""Texts that spell a control token ("<|im_end|>", "[SEP]"), which the tokenizer reads as one."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftkit.models.chat_template import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
SHOWN = 5
"""Rows named in a warning."""


def warn_of_control_tokens(
    texts: Sequence[Iterable[str]], rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Warns of texts that spell a control token: the model reads it as one, such as the end of a turn.

    Args:
        texts: the texts of each row.
        rows: the canonical rows as columns, for their places.
    """
    special = sorted(special_tokens(tokenizer), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
    spelled: dict[int, str] = {}
    for row, parts in enumerate(texts):
        for text in parts:
            if match := pattern.search(text):
                spelled.setdefault(row, match[0])
    if spelled:
        log.warning(
            "%d of %d rows spell control tokens (%s), which are read as such; take them out if that is not meant%s",
            len(spelled), len(texts), ", ".join(sorted(set(spelled.values()))), places(rows, list(spelled)),
        )  # fmt: skip


def places(rows: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> str:
    """The first places of some rows, in brackets; nothing where rows come from no file."""
    named = [f"{rows['_file'][row]}:{rows['_line'][row]}" for row in numbers[:SHOWN]] if "_file" in rows else []
    more = ", …" if len(numbers) > SHOWN else ""
    return f" ({', '.join(named)}{more})" if named else ""
