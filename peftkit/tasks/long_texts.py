"""Texts longer than the model reads, as windows of tokens whose places in the text are known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_offsets(tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """Raises ModelError where the tokenizer does not say where its tokens are; ``kind`` is the task's."""
    if not tokenizer.is_fast:
        raise ModelError(f"task.kind={kind} needs a fast tokenizer, which knows where its tokens are in the text")


def windows(tokens: int, room: int, stride: int) -> Iterator[tuple[int, int, range]]:
    """(first, last, tokens that are scored there) of each window over a text; every token is scored once."""
    begin, scored = 0, 0
    while True:
        end = min(begin + room, tokens)
        last = end == tokens
        until = tokens if last else end - stride // 2
        yield begin, end, range(scored, until)
        if last:
            return
        begin, scored = end - stride, until


@dataclass(frozen=True)
class PairForm:
    """What a tokenizer puts around and between the texts of a pair."""

    opening: list[int]
    middle: list[int]
    closing: list[int]
    types: tuple[int, int, int, int, int] | None
    """Token types of the opening, the first text, the middle, the second text and the closing; None without types."""

    @property
    def size(self) -> int:
        """Tokens that belong to neither text."""
        return len(self.opening) + len(self.middle) + len(self.closing)

    def join(self, first: list[int], second: list[int]) -> tuple[list[int], list[int] | None]:
        """The tokens of a pair, and their types; of the second text the first token is at ``before(first)``."""
        parts = (self.opening, first, self.middle, second, self.closing)
        ids = [token for part in parts for token in part]
        if self.types is None:
            return ids, None
        return ids, [kind for part, kind in zip(parts, self.types) for _ in part]

    def before(self, first: list[int]) -> int:
        """Tokens before the second text."""
        return len(self.opening) + len(first) + len(self.middle)


def pair_form(tokenizer: PreTrainedTokenizerBase) -> PairForm:
    """How the tokenizer writes a pair of texts, from what it makes of one.

    Raises:
        ModelError: the texts of a pair have other tokens than each has alone.
    """
    plain: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: Any = tokenizer("a", "a")
    ids, size = list(whole["input_ids"]), len(plain)
    places = [place for place in range(len(ids) - size + 1) if ids[place : place + size] == plain]
    if len(places) < 2:
        raise ModelError("the tokenizer does not write pairs of texts one after the other")
    first, second = places[0], places[-1]
    types: tuple[int, int, int, int, int] | None = None
    if "token_type_ids" in whole and "token_type_ids" in tokenizer.model_input_names:
        of = list(whole["token_type_ids"])
        between = of[first + size] if second > first + size else of[second]
        types = (of[0], of[first], between, of[second], of[-1])
    return PairForm(ids[:first], ids[first + size : second], ids[second + size :], types)
