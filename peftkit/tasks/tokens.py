"""Texts as token ids, cut to a length, with what each lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.models.context import usable_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(
    texts: list[str], pairs: list[str] | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, list[Any]], list[int]]:
    """Token ids cut to ``max_length`` or to what the model reads, and how many tokens each row lost."""
    limit = usable_length(tokenizer, max_length)
    options = {"return_attention_mask": False, "verbose": False}
    encoded = {key: list(value) for key, value in tokenizer(texts, pairs, **options).items()}
    truncated = [0] * len(texts)
    long = [position for position, ids in enumerate(encoded["input_ids"]) if len(ids) > limit]
    if long:
        cut = tokenizer(
            [texts[position] for position in long],
            [pairs[position] for position in long] if pairs is not None else None,
            truncation=True, max_length=limit, **options,
        )  # fmt: skip
        for row, position in enumerate(long):
            truncated[position] = len(encoded["input_ids"][position]) - len(cut["input_ids"][row])
            for key in encoded:
                encoded[key][position] = cut[key][row]
    return encoded, truncated


def surrounding_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    plain: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: Any = tokenizer("a")["input_ids"]
    for place in range(len(whole) - len(plain) + 1):
        if whole[place : place + len(plain)] == plain:
            return list(whole[:place]), list(whole[place + len(plain) :])
    return [], []
