"""What is recorded of a text, whatever its language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def of_text(texts: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """``characters``, ``tokens`` and ``unknown``, the share of unknown tokens, of texts that were read together."""
    ids = [token for some in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for token in some]
    unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    return {
        "characters": sum(map(len, texts)), "tokens": len(ids), "unknown": unknown / len(ids) if ids else 0.0,
    }  # fmt: skip


def parts(text: str | tuple[str, ...]) -> tuple[str, ...]:
    """The texts that are read together as one."""
    return (text,) if isinstance(text, str) else tuple(text)
