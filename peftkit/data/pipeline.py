"""From a recipe to examples: load → map and check → clean → split → augment (``prepare``), then tokens (``encode``).

Both are cached on disk under a fingerprint of everything they depend on; of several processes one does the work, and
the others read it. Neither needs a model, and ``prepare`` needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from peftkit.data import cleaning, splitting
from peftkit.data.augmentation import augmented
from peftkit.data.batching import collate
from peftkit.data.loading import KeyCheck, read_sources
from peftkit.data.mapping import Rows, canonical_rows, describe
from peftkit.data.source import SPLITS, Source, find_sources
from peftkit.data.steps import CleaningStep
from peftkit.data.tables import BATCH, iterate, open_table, write_rows
from peftkit.errors import DataError
from peftkit.schema.head import Head, head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.registries import READERS, SOURCES
from peftkit.schema.task import Task
from peftkit.schema.types import Batch, Row, TaskInfo
from peftkit.system import parallel
from peftkit.system.cache import cache_folder, cached_entry
from peftkit.system.cores import share_of_cores
from peftkit.system.memory import release_mapped_pages

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """Canonical rows of each split, with ``_file`` and ``_line``, and what was done to them."""

    splits: dict[str, Dataset]
    info: TaskInfo
    steps: tuple[CleaningStep, ...]
    fingerprint: str
    """SHA-256 over the rows of every split and the task's info, wherever the files are."""
    rows_fingerprint: str
    """The same without class weights: equal where runs can be compared."""
    sources: tuple[str, ...]


@dataclass(frozen=True)
class EncodedSplit:
    """Examples of one split, ready to be padded."""

    examples: Dataset
    """Columns input_ids, labels, weight, row (index into the canonical rows), and any others of the task."""
    lengths: np.ndarray
    """Tokens of each example, int32."""
    weights: np.ndarray
    """What each example adds to the loss's denominator, float32."""
    head: Head | None = field(default=None, kw_only=True)
    """The head, which may have its own way to collate."""

    @classmethod
    def of(cls, examples: Dataset, head: Head) -> EncodedSplit:
        """Examples with their lengths and weights, read from the columns."""
        columns: Any = examples.data
        lengths = pc.list_value_length(columns["input_ids"]).to_numpy().astype(np.int32)
        return cls(examples, lengths, columns["weight"].to_numpy().astype(np.float32), head=head)

    @property
    def scored(self) -> np.ndarray | None:
        """Tokens of each example that reach the output layer: the column of that name, or ``weight`` where the head
        counts tokens by it; None for a head that scores no tokens."""
        if "scored" in self.examples.column_names:
            columns: Any = self.examples.with_format("arrow")["scored"]
            return np.asarray(columns, dtype=np.float64)
        return self.weights if self.head is not None and self.head.scores_tokens else None

    def select(self, rows: np.ndarray) -> EncodedSplit:
        return EncodedSplit(self.examples.select(rows), self.lengths[rows], self.weights[rows], head=self.head)

    def for_epoch(self, seed: int, epoch: int) -> EncodedSplit:
        """The split as training reads it in an epoch; see ``Head.for_epoch``."""
        head = self.head.for_epoch(seed, epoch) if self.head is not None else None
        return self if head is self.head else replace(self, head=head)

    def weight(self, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> float:
        """What the rows together add to the loss's denominator."""
        if self.head is None or type(self.head).row_weights is Head.row_weights:
            return float(self.weights[rows].sum())
        return float(sum(self.head.row_weights(self.examples[rows.tolist()], tokenizer)))

    def batch(self, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Batch:
        """The rows as padded tensors, collated by the head or by ``batching.collate``."""
        columns = self.examples[rows.tolist()]
        own = self.head.collate(columns, tokenizer) if self.head else None
        return collate(columns, tokenizer) if own is None else own


@dataclass(frozen=True)
class EncodedData:
    """Examples of each split."""

    splits: dict[str, EncodedSplit]
    fingerprint: str
    """SHA-256 over the rows, the tokenizer, and everything else that the tokens depend on."""


def prepare(recipe: Recipe) -> PreparedData:
    """Loads, maps, checks, cleans, splits and augments the recipe's data.

    Raises:
        DataError: the data are wrong; names file, line and column, and up to ten bad rows.
        HubError: the hub cannot be reached, or has no such data set.
    """
    sources = find_sources(recipe.data)
    path = cache_folder("prepared") / _prepared_key(sources, recipe)
    with cached_entry(path, lambda folder: _prepare(sources, recipe, folder)):
        return _open_prepared(path, tuple(source.name for source in sources))


def _prepare(sources: list[Source], recipe: Recipe, folder: Path) -> None:
    task, data = recipe.task, recipe.data
    reading, keys = list[CleaningStep](), KeyCheck()
    raw = read_sources(sources, task, data, folder, reading, keys)
    try:
        info = describe(raw, task, data)
        release_mapped_pages()
        rows, steps = canonical_rows(raw, task, data, info, folder)
    except DataError as error:
        raise keys.explained(error) from None
    del raw
    for path in folder.glob("raw*"):
        path.unlink()
    splits, cleaning_steps = _clean_and_split(rows, recipe, info)
    steps = [*reading, *steps, *cleaning_steps]
    strata = {name: _strata(rows, index) for name, index in splits.items()}
    steps += [CleaningStep(name, split, "reported", *what) for name, split, *what in task.review(strata, info)]
    copies = _augment(rows.data.select(splits["train"]), recipe, folder, steps)
    known = (info, replace(info, class_weights=None))
    digests = [hashlib.sha256(json.dumps(asdict(one), sort_keys=True).encode()) for one in known]
    for split, index in splits.items():
        np.save(folder / f"{split}.npy", index, allow_pickle=False)
        for digest in digests:
            digest.update(f"{split} {len(index)}".encode() + rows.digest[index].tobytes())
    for digest in digests:
        digest.update(copies.encode())
    fingerprints = dict(zip(("fingerprint", "rows_fingerprint"), [digest.hexdigest() for digest in digests]))
    summary = {"info": asdict(info), "steps": [asdict(step) for step in steps], **fingerprints}
    (folder / "prepared.json").write_text(json.dumps(summary), encoding="utf-8")


def _clean_and_split(rows: Rows, recipe: Recipe, info: TaskInfo) -> tuple[dict[str, np.ndarray], list[CleaningStep]]:
    """Row numbers of each split, in the source's order."""
    task, data = recipe.task, recipe.data
    alive = np.ones(len(rows), dtype=bool)
    steps = cleaning.drop_conflicts(rows, alive, data.cleaning.conflicts)
    steps += cleaning.drop_duplicates(rows, alive, data.cleaning.duplicates)
    # before rows are held out, so that no held-out row is also in the source's own test split
    leakage = cleaning.drop_leakage(rows, alive, rows.split, data.cleaning.leakage)
    near, groups = cleaning.near_duplicates(rows, alive, task, data.cleaning)
    split, splits = splitting.make_splits(rows, alive, groups, data, info.labels)
    steps += leakage + near + splits
    if not np.array_equal(split, rows.split) and data.cleaning.leakage == "drop":
        steps += cleaning.drop_leakage(rows, alive, split, "drop")
    steps += splitting.mix(rows, alive, split, data)
    steps += splitting.limit(rows, alive, split, data)
    numbers = {name: np.flatnonzero(alive & (split == number)) for number, name in enumerate(SPLITS)}
    for name in ("train", "validation"):
        if not len(numbers[name]):
            done = "; ".join(f"{step.name} {step.action} {step.rows}" for step in steps if step.action == "dropped")
            raise DataError(f"no row is left in the {name} split{f' ({done})' if done else ''}; see data.cleaning")
    return {name: index for name, index in numbers.items() if len(index)}, steps


def _strata(rows: Rows, index: np.ndarray) -> dict[str, int]:
    """Rows of each stratum of a split."""
    counts = np.bincount(rows.stratum[index], minlength=len(rows.strata)).tolist()
    return {name: count for name, count in zip(rows.strata, counts) if count}


def _augment(train: Dataset, recipe: Recipe, folder: Path, steps: list[CleaningStep]) -> str:
    """Writes the augmented copies; returns a digest of their texts."""
    config = recipe.data.augmentation
    if config is None:
        return ""
    copies = write_rows(augmented(train, recipe.task, config, recipe.training.seed), folder, "augmented")
    steps.append(CleaningStep("augmentation", "train", "added", 0 if copies is None else len(copies)))
    digest = hashlib.sha256()
    for row in iterate(copies) if copies is not None else ():
        digest.update(f"{recipe.task.text_of(row)}\0".encode())
    return digest.hexdigest()


def _open_prepared(folder: Path, sources: tuple[str, ...]) -> PreparedData:
    from datasets import concatenate_datasets

    summary = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    rows = open_table(folder / "canonical.arrow")
    files = {split: file for split in SPLITS if (file := folder / f"{split}.npy").is_file()}
    splits = {split: rows.select(np.load(file, allow_pickle=False)) for split, file in files.items()}
    if (folder / "augmented.arrow").is_file():
        copies = open_table(folder / "augmented.arrow")
        splits["train"] = concatenate_datasets([splits["train"], copies.cast(rows.features)])
    steps = tuple(CleaningStep(**_with_tuples(step)) for step in summary["steps"])
    info = TaskInfo(**_with_tuples(summary["info"]))
    return PreparedData(splits, info, steps, summary["fingerprint"], summary["rows_fingerprint"], sources)


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of a dataclass as they were before JSON made lists of their tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def encode(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> EncodedData:
    """Tokens, labels and weights of every split; raises DataError when a row cannot be encoded or none is left."""
    fingerprint = _encoded_fingerprint(prepared, tokenizer, recipe)
    path = cache_folder("encoded") / hashlib.sha256((fingerprint + _code_digest(recipe.task)).encode()).hexdigest()

    def write(folder: Path) -> None:
        for split, rows in prepared.splits.items():
            _encode_split(rows, split, tokenizer, recipe, prepared.info, folder)

    with cached_entry(path, write):
        head = head_of(prepared.info, recipe.task)
        splits = {split: EncodedSplit.of(open_table(path / f"{split}.arrow"), head) for split in prepared.splits}
        return EncodedData(splits, fingerprint)


def _encode_split(
    rows: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, info: TaskInfo, folder: Path
) -> None:
    starts = range(0, len(rows), BATCH)

    def encode_chunk(start: int) -> dict[str, list[Any]]:
        columns = _encode_columns(rows[start : start + BATCH], tokenizer, recipe, info)
        release_mapped_pages()
        return columns

    skip = split == "train" and recipe.task.skips_unscored

    def examples() -> Iterator[Row]:
        workers = share_of_cores(recipe.training.threads)
        for start, columns in zip(starts, parallel.in_order(encode_chunk, starts, workers)):
            yield from (example for example in _examples(columns, start) if example["weight"] or not skip)

    if write_rows(examples(), folder, split) is None:
        first: Any = rows[0]
        message = f"the {split} split, which starts here, has no example left after tokenizing; see data.max_length"
        raise DataError(message, file=first["_file"], line=first["_line"])


def _encode_columns(
    columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, info: TaskInfo
) -> dict[str, list[Any]]:
    """Examples of a batch of rows, as columns."""
    try:
        return recipe.task.encode(columns, tokenizer, recipe.data, info)
    except DataError as error:
        if error.file is not None or "_file" not in columns:
            raise
        message = f"{error.message} (in rows {columns['_line'][0]} to {columns['_line'][-1]})"
        raise DataError(message, file=columns["_file"][0], column=error.column) from None


def _examples(columns: dict[str, list[Any]], start: int) -> Iterator[Row]:
    """Examples one by one; their batch of rows begins at row ``start`` of its split."""
    for values in zip(*columns.values()):
        example = dict(zip(columns, values))
        example["row"] += start
        yield example


def encode_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, info: TaskInfo) -> EncodedSplit:
    """Canonical rows encoded in memory, for prediction; raises DataError where none makes an example."""
    from datasets import Dataset

    examples: list[Row] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        columns = {
            name: [row.get(name) for row in batch] for name in dict.fromkeys(key for row in batch for key in row)
        }
        examples += _examples(_encode_columns(columns, tokenizer, recipe, info), start)
    if not examples:
        raise DataError("no example is left after tokenizing; see data.max_length")
    # with a fingerprint of its own: hashing the rows for one takes longer than encoding them
    split = Dataset(pa.Table.from_pylist(examples), fingerprint=secrets.token_hex(8))
    return EncodedSplit.of(split, head_of(info, recipe.task))


def _encoded_fingerprint(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
    """SHA-256 over everything that the tokens depend on.

    Checkpoints store it, so it must not change: hence not ``tokenizer_fingerprint``, which leaves model_max_length out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = dict(tokenizer.get_vocab()) if backend is None else json.loads(backend.to_str())
    if backend is not None:  # the last call sets these, not the tokenizer
        rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    special = {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())}
    tokens = [type(tokenizer).__name__, rules, special, tokenizer.chat_template, _limit(tokenizer, recipe)]
    fields = {name: getattr(recipe.data, name) for name in ("max_length", "system", "format", "columns")}
    return _sha([prepared.fingerprint, _sha(tokens), recipe.task.model_dump(mode="json"), fields])


def _limit(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> int:
    """The limit that the tokenizer declares, as in old checkpoints, or the model's where that one cuts more."""
    lowered: int = tokenizer.model_max_length
    declared: int = tokenizer.init_kwargs.get("model_max_length") or lowered
    return declared if min(recipe.data.max_length, declared) <= lowered else lowered


def _prepared_key(sources: list[Source], recipe: Recipe) -> str:
    """SHA-256 over everything that the prepared rows depend on."""
    digests = [source.digest for source in sources]
    data = recipe.data.model_dump(mode="json", exclude={"max_length"})
    seed = recipe.training.seed if recipe.data.augmentation is not None else None
    return _sha([digests, data, recipe.task.model_dump(mode="json"), seed, _code_digest(recipe.task)])


def _code_digest(task: Task) -> str:
    """Digest of the code that makes the rows, so that a cache of another version is not used."""
    files = {*Path(__file__).parent.rglob("*.py"), Path(__file__).parents[1] / "models" / "chat_template.py"}
    kinds = [type(task), *(registry.get(name) for registry in (SOURCES, READERS) for name in registry)]
    for kind in kinds:
        if own := getattr(sys.modules.get(kind.__module__), "__file__", None):
            files |= {*Path(own).parent.glob("*.py")} if "peftkit" in Path(own).parts else {Path(own)}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()).hexdigest()
