"""The data's way into a run: load → map and check → clean → split → augment (``prepare``), then tokens (``encode``).

Both are kept on disk under a fingerprint of everything they depend on. Of several processes one does the work, and
the others read it. Neither needs a model, and ``prepare`` needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftkit.data import cleaning, splitting
from peftkit.data.augmentation import augmented
from peftkit.data.batching import collate
from peftkit.data.mapping import PARTS, Rows, canonical_rows, describe
from peftkit.data.sources import Source, find, read
from peftkit.data.steps import CleaningStep
from peftkit.data.tables import BATCH, open_table, release, write_rows
from peftkit.errors import DataError
from peftkit.schema.head import Head, head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.task import Task
from peftkit.schema.types import Batch, Row, TaskInfo
from peftkit.system import parallel
from peftkit.system.cache import atomic_folder, cache_folder, entry_lock, is_intact

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["CleaningStep", "EncodedData", "EncodedSplit", "PreparedData", "encode", "encode_rows", "prepare"]


@dataclass(frozen=True)
class PreparedData:
    """Canonical rows of each split, with ``_file`` and ``_line``, and what was done to them."""

    splits: dict[str, Dataset]
    info: TaskInfo
    steps: tuple[CleaningStep, ...]
    fingerprint: str
    """SHA-256 over the rows of every split and what the task learned; where they lay does not matter."""
    sources: tuple[str, ...]


@dataclass(frozen=True)
class EncodedSplit:
    """Examples of one split, ready to be padded."""

    examples: Dataset
    """Columns input_ids, labels, weight, row (index into the canonical rows), and what else the task gives."""
    lengths: np.ndarray
    """Tokens of each example, int32."""
    weights: np.ndarray
    """What each example adds to the loss's denominator, float32."""
    head: Head | None = field(default=None, kw_only=True)
    """Which may collate batches its own way."""

    def select(self, rows: np.ndarray) -> EncodedSplit:
        """Some of the examples."""
        return EncodedSplit(self.examples.select(rows), self.lengths[rows], self.weights[rows], head=self.head)

    def batch(self, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Batch:
        """The rows as padded tensors; see ``batching.collate``."""
        columns = self.examples[rows.tolist()]
        own = self.head.collate(columns, tokenizer) if self.head else None
        return collate(columns, tokenizer) if own is None else own


@dataclass(frozen=True)
class EncodedData:
    """Examples of each split."""

    splits: dict[str, EncodedSplit]
    fingerprint: str
    """SHA-256 over the rows, the tokenizer and what else decides on the tokens."""


def prepare(recipe: Recipe) -> PreparedData:
    """Loads, maps, checks, cleans, splits and augments the recipe's data.

    Raises:
        DataError: the data are wrong; names file, line and column, and up to ten bad rows.
        HubError: the hub cannot give them.
    """
    found = find(recipe.data)
    key = _prepared_key(found, recipe)
    path = cache_folder("prepared") / key
    with entry_lock(path):
        if not is_intact(path):
            with atomic_folder(path) as folder:
                _prepare(found, recipe, folder)
        return _open_prepared(path, tuple(source.name for source in found))


def _prepare(found: list[Source], recipe: Recipe, folder: Path) -> None:
    """Writes canonical rows, the rows of each split, and what was learned and done, into ``folder``."""
    task, data = recipe.task, recipe.data
    raw = [read(source, data, folder, f"raw{number}") for number, source in enumerate(found)]
    info = describe(raw, task, data)
    release()
    rows, steps = canonical_rows(raw, task, data, info, folder)
    del raw
    for path in folder.glob("raw*"):
        path.unlink()
    kept, more = _clean_and_split(rows, recipe, info)
    steps += more
    extra = _augment(rows.data.select(kept["train"]), recipe, folder, steps)
    digest = hashlib.sha256(json.dumps(asdict(info), sort_keys=True).encode())
    for part, index in kept.items():
        np.save(folder / f"{part}.npy", index, allow_pickle=False)
        digest.update(f"{part} {len(index)}".encode() + rows.digest[index].tobytes())
    digest.update(extra.encode())
    held = {"info": asdict(info), "steps": [asdict(step) for step in steps], "fingerprint": digest.hexdigest()}
    (folder / "prepared.json").write_text(json.dumps(held), encoding="utf-8")


def _clean_and_split(rows: Rows, recipe: Recipe, info: TaskInfo) -> tuple[dict[str, np.ndarray], list[CleaningStep]]:
    """Row numbers of each split, in the source's order."""
    task, data = recipe.task, recipe.data
    alive = np.ones(len(rows), dtype=bool)
    steps = cleaning.drop_conflicts(rows, alive, data.cleaning.conflicts)
    steps += cleaning.drop_duplicates(rows, alive, data.cleaning.duplicates)
    # before rows are held out, so that none of them turns out to stand in the source's test split
    leaked = cleaning.drop_leakage(rows, alive, rows.part, data.cleaning.leakage)
    more, groups = cleaning.near_duplicates(rows, alive, task, data.cleaning)
    part, made = splitting.make_splits(rows, alive, groups, data, info.labels)
    steps += leaked + more + made
    if not np.array_equal(part, rows.part) and data.cleaning.leakage == "drop":
        steps += cleaning.drop_leakage(rows, alive, part, "drop")
    steps += splitting.mix(rows, alive, part, data)
    steps += splitting.limit(rows, alive, part, data)
    kept = {name: np.flatnonzero(alive & (part == number)) for number, name in enumerate(PARTS)}
    empty = [name for name in ("train", "validation") if not len(kept[name])]
    if empty:
        done = "; ".join(f"{step.name} {step.action} {step.rows}" for step in steps if step.action == "dropped")
        raise DataError(f"no row is left in the {empty[0]} split{f' ({done})' if done else ''}; see data.cleaning")
    return {name: index for name, index in kept.items() if len(index)}, steps


def _augment(train: Dataset, recipe: Recipe, folder: Path, steps: list[CleaningStep]) -> str:
    """Writes the changed copies; returns a digest of their texts."""
    config = recipe.data.augmentation
    if config is None:
        return ""
    digest, count = hashlib.sha256(), 0

    def copies() -> Iterator[Row]:
        nonlocal count
        for row in augmented(train, recipe.task, config, recipe.training.seed):
            digest.update(recipe.task.text_of(row).encode("utf-8", "surrogatepass") + b"\0")
            count += 1
            yield row

    write_rows(copies(), folder, "augmented")
    steps.append(CleaningStep("augmentation", "train", "added", count))
    return digest.hexdigest()


def _open_prepared(folder: Path, sources: tuple[str, ...]) -> PreparedData:
    from datasets import concatenate_datasets

    held = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    rows = open_table(folder / "canonical.arrow")
    splits = {}
    for part in PARTS:
        if (folder / f"{part}.npy").is_file():
            splits[part] = rows.select(np.load(folder / f"{part}.npy", allow_pickle=False))
    if (folder / "augmented.arrow").is_file():
        extra = open_table(folder / "augmented.arrow")
        splits["train"] = concatenate_datasets([splits["train"], extra.cast(rows.features)])
    steps = tuple(CleaningStep(**{**step, "examples": tuple(step["examples"])}) for step in held["steps"])
    return PreparedData(splits, _info(held["info"]), steps, held["fingerprint"], sources)


def _info(values: dict[str, Any]) -> TaskInfo:
    held: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return TaskInfo(**held)


def encode(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> EncodedData:
    """Tokens, labels and weights of every split.

    Raises:
        DataError: a row cannot be encoded, or a split has no example left.
    """
    fingerprint = _encoded_fingerprint(prepared, tokenizer, recipe)
    path = cache_folder("encoded") / hashlib.sha256((fingerprint + _code_digest(recipe.task)).encode()).hexdigest()
    with entry_lock(path):
        if not is_intact(path):
            with atomic_folder(path) as folder:
                for part, rows in prepared.splits.items():
                    _encode_split(rows, part, tokenizer, recipe, prepared.info, folder)
        head = head_of(prepared.info, recipe.task)
        return EncodedData({part: _open_encoded(path, part, head) for part in prepared.splits}, fingerprint)


def _encode_split(
    rows: Dataset, part: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, info: TaskInfo, folder: Path
) -> None:
    lengths, weights = array("i"), array("f")
    starts = range(0, len(rows), BATCH)

    def columns(start: int) -> dict[str, list[Any]]:
        made = _encoded(rows[start : start + BATCH], tokenizer, recipe, info)
        release()
        return made

    def examples() -> Iterator[Row]:
        workers = parallel.share_of_cores(recipe.training.threads)
        for start, made in zip(starts, parallel.in_order(columns, starts, workers)):
            for example in _examples(made, start):
                lengths.append(len(example["input_ids"]))
                weights.append(example["weight"])
                yield example

    if write_rows(examples(), folder, part) is None:
        first: Any = rows[0]
        said = f"the {part} split, whose first row this is, has no example left after tokenizing; see data.max_length"
        raise DataError(said, file=first["_file"], line=first["_line"])
    np.save(folder / f"{part}-lengths.npy", np.array(lengths, dtype=np.int32), allow_pickle=False)
    np.save(folder / f"{part}-weights.npy", np.array(weights, dtype=np.float32), allow_pickle=False)


def _encoded(
    columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, info: TaskInfo
) -> dict[str, list[Any]]:
    """Examples of a batch of rows, as columns."""
    try:
        return recipe.task.encode(columns, tokenizer, recipe.data, info)
    except DataError as error:
        raise error if error.file is not None or "_file" not in columns else _first_place(error, columns) from None


def _examples(made: dict[str, list[Any]], start: int) -> Iterator[Row]:
    """Examples one by one; their batch of rows begins at row ``start`` of its split."""
    for values in zip(*made.values()):
        example = dict(zip(made, values))
        example["row"] += start
        yield example


def _first_place(error: DataError, columns: dict[str, list[Any]]) -> DataError:
    said = f"{error.message} (in rows {columns['_line'][0]} to {columns['_line'][-1]})"
    return DataError(said, file=columns["_file"][0], column=error.column)


def _open_encoded(folder: Path, part: str, head: Head) -> EncodedSplit:
    arrays = [np.load(folder / f"{part}-{name}.npy", allow_pickle=False) for name in ("lengths", "weights")]
    return EncodedSplit(open_table(folder / f"{part}.arrow"), *arrays, head=head)


def encode_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, info: TaskInfo) -> EncodedSplit:
    """Canonical rows encoded in memory, for prediction."""
    from datasets import Dataset

    made: list[Row] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        columns = {name: [row[name] for row in batch] for name in batch[0]}
        made += _examples(_encoded(columns, tokenizer, recipe, info), start)
    lengths = np.array([len(example["input_ids"]) for example in made], dtype=np.int32)
    weights = np.array([example["weight"] for example in made], dtype=np.float32)
    return EncodedSplit(Dataset.from_list(made), lengths, weights, head=head_of(info, recipe.task))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all that decides on the tokens: vocabulary, rules, special tokens, template; not the padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    held: dict[str, Any]
    if backend is not None:
        held = json.loads(backend.to_str())
        held = {name: value for name, value in held.items() if name not in ("truncation", "padding")}
    else:
        held = dict(tokenizer.get_vocab())
    special = {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())}
    parts = [type(tokenizer).__name__, held, special, tokenizer.chat_template, tokenizer.model_max_length]
    return _sha(parts)


def _encoded_fingerprint(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
    data = recipe.data
    decides = {"max_length": data.max_length, "system": data.system, "format": data.format, "columns": data.columns}
    return _sha([prepared.fingerprint, tokenizer_fingerprint(tokenizer), recipe.task.model_dump(mode="json"), decides])


def _prepared_key(found: list[Source], recipe: Recipe) -> str:
    """Everything that the prepared rows depend on."""
    digests = [source.digest for source in found]
    data = recipe.data.model_dump(mode="json", exclude={"max_length"})
    seed = recipe.training.seed if recipe.data.augmentation is not None else None
    return _sha([digests, data, recipe.task.model_dump(mode="json"), seed, _code_digest(recipe.task)])


def _code_digest(task: Task) -> str:
    """Digest of the code that makes the rows, so that no other version's cache is taken for this one's."""
    files = [*Path(__file__).parent.glob("*.py"), Path(__file__).parents[1] / "models" / "chat_template.py"]
    own = getattr(sys.modules.get(type(task).__module__), "__file__", None)
    files += (
        sorted(Path(own).parent.glob("*.py")) if own and "peftkit" in Path(own).parts else [Path(own)] if own else []
    )
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()).hexdigest()
