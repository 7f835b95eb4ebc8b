"""What is recorded of a text and of its answer, whatever the language."""

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


def of_answer(answer: Any) -> tuple[Any, float | None]:
    """The label of an answer, or the labels of its spans, and how probable it is; None where it has none.

    The probability of spans is the mean over them.
    """
    if hasattr(answer, "spans"):
        spans = answer.spans
        mean = sum(span.probability for span in spans) / len(spans) if spans else None
        return tuple(span.label for span in spans), mean
    return getattr(answer, "label", None), getattr(answer, "probability", None)


def parts(text: str | tuple[str, ...]) -> tuple[str, ...]:
    """The texts that are read together as one."""
    return (text,) if isinstance(text, str) else tuple(text)
