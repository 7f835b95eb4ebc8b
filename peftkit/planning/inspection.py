"""The data as the model will see them: rows, classes, lengths, truncation, padding, and examples token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peftkit.data.batching import epoch_batches
from peftkit.data.pipeline import EncodedSplit, PreparedData, encode, prepare
from peftkit.data.steps import CleaningStep
from peftkit.data.tables import iterate
from peftkit.schema.head import Head, head_of
from peftkit.schema.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
BINS = 20
EXAMPLES = 3
WINDOW = 64


@dataclass(frozen=True)
class Bin:
    """A bar of the length histogram: examples of ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    examples: int


@dataclass(frozen=True)
class Token:
    """A token of an example as text, and whether the model learns to predict it."""

    text: str
    special: bool
    supervised: bool
    note: str = ""
    """The tag of its word, or that the answer ends here."""


@dataclass(frozen=True)
class Example:
    """A sequence of an encoded example; ``label`` is its class, or empty if every token has its own."""

    place: str
    label: str
    tokens: tuple[Token, ...]
    truncated: int
    part: str = ""
    """Which of several sequences of an example it is: chosen or rejected."""


@dataclass(frozen=True)
class SplitView:
    """Statistics of one split."""

    name: str
    rows: int
    examples: int
    classes: dict[str, int]
    """Rows, or words, per class, in id order; empty without classes."""
    tokens: int
    quantiles: dict[str, int]
    """Tokens per example, by "0%" … "100%"."""
    histogram: tuple[Bin, ...]
    truncated_examples: int
    truncated_tokens: int
    padding: float
    """Share of padding in the first epoch's global batches."""
    padding_unsorted: float
    """The same with batches of rows in random order."""
    supervised: float | None
    """Share of tokens with a label; None if labels are per row."""
    shown: tuple[Example, ...]


@dataclass(frozen=True)
class Inspection:
    """What ``peftkit inspect`` shows."""

    name: str
    sources: tuple[str, ...]
    task: str
    problem_type: str
    labels: tuple[str, ...]
    max_length: int
    batch_size: int
    fingerprint: str
    steps: tuple[CleaningStep, ...]
    splits: tuple[SplitView, ...]
    class_unit: str = "rows"
    """What classes are counted in: rows or words."""
    length_unit: str = "row"
    """What has at most ``max_length`` tokens: a row, or each text of a row."""

    @property
    def what(self) -> str:
        """Task and, where that says more, its head: ``classification (regression)``."""
        task, *head = dict.fromkeys((self.task, self.problem_type))
        return f"{task} ({head[0]})" if head else task

    @property
    def class_shares(self) -> dict[str, list[tuple[int, float]]]:
        """For each class, count and share in every split: of its rows, or of its words."""
        shares: dict[str, list[tuple[int, float]]] = {}
        for name in dict.fromkeys(name for split in self.splits for name in split.classes):
            counts = [split.classes.get(name, 0) for split in self.splits]
            totals = [split.rows if self.class_unit == "rows" else sum(split.classes.values()) for split in self.splits]
            shares[name] = [(count, count / max(1, total)) for count, total in zip(counts, totals)]
        return shares

    def as_dict(self) -> dict[str, Any]:
        """The inspection as plain values."""
        return asdict(self)


def inspect(recipe: Recipe, *, examples: int = EXAMPLES) -> Inspection:
    """Prepare, encode and inspect a recipe's data, with some examples per split; no model is loaded.

    Raises:
        DataError, HubError, ModelError: those of ``prepare``, ``encode`` and the tokenizer.
    """
    from peftkit.models.context import usable_length
    from peftkit.models.tokenizer import load_tokenizer

    prepared = prepare(recipe)
    tokenizer = load_tokenizer(recipe.model)
    encoded = encode(prepared, tokenizer, recipe)
    views = tuple(
        _view_split(name, prepared, encoded.splits[name], tokenizer, recipe, examples) for name in prepared.splits
    )
    return Inspection(
        recipe.name, prepared.sources, recipe.task.kind, prepared.info.problem_type, prepared.info.labels,
        usable_length(tokenizer, recipe.data.max_length), recipe.training.batch_size, encoded.fingerprint,
        prepared.steps, views, head_of(prepared.info, recipe.task).class_unit,
        "row" if recipe.task.texts_per_row(recipe.data) == 1 else "text",
    )  # fmt: skip


def _view_split(
    name: str, prepared: PreparedData, encoded: EncodedSplit, tokenizer: PreTrainedTokenizerBase, recipe: Recipe,
    examples: int,
) -> SplitView:  # fmt: skip
    rows, lengths, head = prepared.splits[name], encoded.lengths, head_of(prepared.info, recipe.task)
    shown = [encoded.examples[index] for index in range(min(examples, len(lengths)))]
    has_truncated = "truncated" in encoded.examples.column_names
    truncated = np.array(encoded.examples["truncated"]) if has_truncated else np.zeros(1, int)
    return SplitView(
        name=name,
        rows=len(rows),
        examples=len(lengths),
        classes=head.class_counts(rows),
        tokens=int(lengths.sum()),
        quantiles={f"{share:.0%}": int(np.quantile(lengths, share, method="lower")) for share in QUANTILES},
        histogram=histogram(lengths),
        truncated_examples=int((truncated > 0).sum()),
        truncated_tokens=int(truncated.sum()),
        padding=_padding(lengths, recipe, recipe.training.batching),
        padding_unsorted=_padding(lengths, recipe, "random"),
        supervised=_supervised_share(encoded),
        shown=tuple(one for example in shown for one in _examples(example, rows, head, tokenizer)),
    )


def histogram(lengths: np.ndarray) -> tuple[Bin, ...]:
    """Bars of equal width over the lengths; every example is in exactly one."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // BINS))
    counts = np.bincount((lengths - low) // width)
    return tuple(
        Bin(low + number * width, min(high, low + (number + 1) * width - 1), int(count))
        for number, count in enumerate(counts)
    )


def _padding(lengths: np.ndarray, recipe: Recipe, batching: str) -> float:
    training = recipe.training.model_copy(update={"batching": batching})
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in epoch_batches(lengths, training, 0))
    return 1 - float(lengths.sum()) / padded


def _supervised_share(encoded: EncodedSplit) -> float | None:
    if not _per_token(encoded.examples[0]):
        return None
    labels = (label for example in iterate(encoded.examples, ["labels"]) for label in example["labels"])
    return sum(label != IGNORE for label in labels) / max(1, int(encoded.lengths.sum()))


def _per_token(example: dict[str, Any]) -> bool:
    """Whether labels are token ids: a list of integers as long as the input."""
    labels = example["labels"]
    per_token = isinstance(labels, list) and len(labels) == len(example["input_ids"])
    return per_token and all(isinstance(label, int) for label in labels)


def _examples(
    example: dict[str, Any], rows: Dataset, head: Head, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Example]:
    """Every sequence of an encoded example; what was cut off is counted with the first."""
    row, ids, special = rows[example["row"]], example["input_ids"], set(tokenizer.all_special_ids)
    per_token = _per_token(example)
    supervised = [label != IGNORE for label in example["labels"]] if per_token else [False] * len(ids)
    notes = head.token_notes(example)
    texts = enumerate(zip(ids, token_texts(ids, tokenizer), supervised))
    tokens = tuple(Token(text, token in special, learned, notes.get(at, "")) for at, (token, text, learned) in texts)
    label = "" if per_token else head.label_text(example["labels"])
    truncated = int(example.get("truncated") or 0)
    for number, (name, part) in enumerate(head.parts(example)):
        yield Example(f"{row['_file']}:{row['_line']}", label, tokens[part], 0 if number else truncated, name)


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the decoded text; a character of several tokens appears with the last of them."""

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    texts: list[str] = []
    special = set(tokenizer.all_special_ids)
    start, before = 0, ""
    for index, token in enumerate(ids):
        if token in special:
            texts.append(decode([token]))
            start, before = index + 1, ""
            continue
        text = decode(ids[start : index + 1])
        if text.endswith("\ufffd") and index + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        before, alone = text, decode([token])
        if index - start > WINDOW and "\ufffd" not in alone:
            start, before = index, alone  # keeps the time linear in the length
    return texts
