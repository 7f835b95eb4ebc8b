"""Masked language modeling: an encoder goes on reading texts of a domain, so that it knows their words.

    task: {kind: masked_lm, mask_probability: 0.15}
    data: {source: my_texts/, max_length: 128}

    [CLS] the [MASK] rose after the bank cut its rates [SEP]     hidden: price

Pretraining continued on texts of the domain before a task is learned there (Gururangan et al. 2020, arXiv:2004.10964).
A document is cut into windows of about equal length, between words; no window holds two documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from peftkit.data.problems import require_column, shorten
from peftkit.errors import DataError, ModelError
from peftkit.heads.masked_lm import NAME
from peftkit.heads.masks import IGNORE, NO_WORD, Masking
from peftkit.schema.registries import TASKS
from peftkit.schema.task import Task
from peftkit.schema.types import Row, TaskInfo
from peftkit.tasks.control_tokens import warn_of_control_tokens
from peftkit.tasks.language import check_window, document, refuse_augmentation
from peftkit.tasks.tokens import surrounding_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig

FILL = "fill"
"""Whether a canonical row is a text whose masks are to be filled."""
Share = Annotated[float, Field(ge=0, le=1)]


@TASKS.register("masked_lm")
class MaskedLanguageModeling(Task):
    """Adapts an encoder to a domain: it learns to predict hidden words of the texts."""

    heads: ClassVar[tuple[str, ...]] = (NAME,)
    merges_sources: ClassVar[bool] = False

    kind: Literal["masked_lm"] = "masked_lm"
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of each window's tokens that are hidden and predicted, at least one."""
    whole_word: bool = False
    """Hide all tokens of a word or none, so that no word is guessed by its own pieces."""
    replacement_shares: tuple[Share, Share, Share] = (0.8, 0.1, 0.1)
    """What stands in place of the hidden tokens: the mask token, a random token, the token itself; together 1."""
    candidates: Annotated[int, Field(ge=1)] = 5
    """Tokens that predict gives for each mask, the likeliest first."""

    @field_validator("replacement_shares")
    @classmethod
    def _check_sum(cls, shares: tuple[float, float, float]) -> tuple[float, float, float]:
        if abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"expected three shares that add up to 1, found {', '.join(f'{one:g}' for one in shares)}")
        return shares

    @property
    def masking(self) -> Masking:
        """How tokens are hidden."""
        return Masking(self.mask_probability, self.whole_word, self.replacement_shares)

    def head_options(self, info: TaskInfo) -> dict[str, Any]:
        return {"masking": self.masking, "candidates": self.candidates}

    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Checks that every split has the column of the text; raises DataError where one has not."""
        refuse_augmentation(data)
        for rows in splits.values():
            require_column(rows, data.text, "data.text")
        return TaskInfo(NAME)

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """The document as ``text``; raises DataError when it is not text. A null is an empty document."""
        return document(row, data)

    def text_of(self, row: Row) -> str:
        return str(row["text"])

    def input_row(self, values: Sequence[str]) -> Row:
        return {"text": values[0], FILL: True}

    # -- tokens ----------------------------------------------------------------------------------------------------

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """Documents → windows of at most ``data.max_length`` tokens, in which nothing is lost.

        Columns besides the contract's: ``words``, the number of each token's word or -1 for tokens that are never
        hidden; and for rows to be filled ``masks``, the number of their masks. ``labels`` are those of a held-out row;
        training hides other tokens in every epoch.

        Raises:
            ModelError: the tokenizer has no mask token, or does not know where words begin.
            DataError: a text to be filled has no mask, or its masks are too far apart for a window.
        """
        check_window(tokenizer, data)
        self._check_tokenizer(tokenizer)
        if FILL in rows:
            return self._to_fill(rows["text"], tokenizer, data.max_length)
        warn_of_control_tokens([(text,) for text in rows["text"]], rows, tokenizer)
        opening, closing = surrounding_tokens(tokenizer)
        room, columns = data.max_length - len(opening) - len(closing), _Columns(tokenizer)
        for row, (ids, words) in enumerate(_tokens_and_words(rows["text"], tokenizer)):
            for start, end in windows(words, room):
                inside = [*opening, *ids[start:end], *closing]
                numbers = [*[NO_WORD] * len(opening), *words[start:end], *[NO_WORD] * len(closing)]
                if any(word != NO_WORD for word in numbers):
                    _, labels = self.masking.hide(inside, numbers, tokenizer)
                    columns.add(inside, labels, numbers, row)
        return columns.values

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.mask_token_id is None:
            raise ModelError(
                f"the tokenizer has no mask token, which task.kind={self.kind} hides words with: choose an encoder as "
                "model.source; task.kind=style teaches a decoder the texts of a domain"
            )
        if self.whole_word and not tokenizer.is_fast:
            raise ModelError("task.whole_word needs a fast tokenizer, which knows the words that its tokens are of")

    def _to_fill(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list[Any]]:
        """Each text as one window around its masks."""
        opening, closing = surrounding_tokens(tokenizer)
        room, columns = max_length - len(opening) - len(closing), _Columns(tokenizer)
        mask = tokenizer.mask_token_id
        for row, (ids, _) in enumerate(_tokens_and_words(texts, tokenizer)):
            places = [place for place, token in enumerate(ids) if token == mask]
            if not places:
                text = shorten(texts[row])
                raise DataError(f"{text} has no {tokenizer.mask_token}: write it in place of each word to predict")
            width = places[-1] - places[0] + 1
            if width > room:
                raise DataError(
                    f"{shorten(texts[row])} has masks {width} tokens apart, and a window has {room}; predict them in "
                    "several texts, or raise data.max_length"
                )
            start = max(0, min(places[0] - (room - width) // 2, len(ids) - room))
            inside = [*opening, *ids[start : start + room], *closing]
            labels = [token if token == mask else IGNORE for token in inside]
            columns.add(inside, labels, [NO_WORD] * len(inside), row, masks=len(places))
        return columns.values


class _Columns:
    """Examples as columns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        names = ("input_ids", "labels", "words", "weight", "row")
        types = ("token_type_ids",) if "token_type_ids" in tokenizer.model_input_names else ()
        self.values: dict[str, list[Any]] = {name: [] for name in (*names, *types)}

    def add(self, ids: list[int], labels: list[int], words: list[int], row: int, **others: Any) -> None:
        weight = float(sum(label != IGNORE for label in labels))
        example = {"input_ids": ids, "labels": labels, "words": words, "weight": weight, "row": row, **others}
        if "token_type_ids" in self.values:
            example["token_type_ids"] = [0] * len(ids)
        for name, value in example.items():
            self.values.setdefault(name, []).append(value)


def windows(words: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    """(first token, token after the last) of as few windows of at most ``room`` tokens as there can be, or nearly.

    Windows of a document are of about equal length, and end where a word ends, unless a word fills a window.
    """
    start = 0
    while start < len(words):
        left = len(words) - start
        end = start + -(-left // -(-left // room))
        cut = end
        while start < cut < len(words) and words[cut] == words[cut - 1] != NO_WORD:
            cut -= 1
        end = cut if cut > start else end
        yield start, end
        start = end


def _tokens_and_words(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """Each text's tokens, and the number of each one's word: -1 for special tokens, its place without such numbers."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    encoded: Any = tokenizer(list(texts), **options)
    special = set(tokenizer.all_special_ids)
    for row, ids in enumerate(encoded["input_ids"]):
        words = encoded.word_ids(row) if tokenizer.is_fast else range(len(ids))
        yield (
            list(ids),
            [NO_WORD if token in special or word is None else word for token, word in zip(ids, words, strict=True)],
        )
