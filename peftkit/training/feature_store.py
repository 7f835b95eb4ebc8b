"""Features on disk: the batches of a split that read them, digests for cache keys, and eviction.

features/KEY/features.npy    [rows, width], or [tokens, width] with the rows' tokens end to end; manifest.json
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftkit.data.batching import MODEL_INPUTS
from peftkit.data.pipeline import EncodedSplit
from peftkit.system.cache import cache_folder
from peftkit.training.frozen_trunk import FEATURES

FILE = "features.npy"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
STORED = {torch.bfloat16: np.uint16, torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}
"""numpy has no bf16: its bits are stored as integers."""
CODE = ("models/pooled_logits.py", "models/kernels/attention.py", "models/kernels/first_token.py",
        "models/kernels/rms_norm.py", "models/loading.py", "models/packing.py", "training/feature_store.py",
        "training/frozen_trunk.py")  # fmt: skip
"""Files of the package that compute features from tokens: a change of them invalidates all features."""
GB = 10**9


@dataclass(frozen=True)
class FeatureSplit(EncodedSplit):
    """A split whose batches carry ``features`` and, with one vector per row, a single token per row."""

    stored: np.ndarray
    """[rows, width], or [tokens, width] with the rows' tokens end to end; memory-mapped."""
    dtype: torch.dtype
    per_row: bool
    starts: np.ndarray = field(repr=False)
    """Index of each row's first token."""
    columns: Mapping[str, Tensor] = field(repr=False)
    """``labels`` and ``weight`` of all rows, with one vector per row."""

    def batch(self, rows: np.ndarray, tokenizer: Any) -> dict[str, Tensor]:
        """The rows as padded tensors, with the trunk's output."""
        if self.per_row:
            ids = torch.zeros(len(rows), 1, dtype=torch.long)
            columns = {name: values[torch.from_numpy(rows)] for name, values in self.columns.items()}
            features = self._tensor(self.stored[rows])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **columns, FEATURES: features}
        batch = super().batch(rows, tokenizer)
        return {**batch, FEATURES: self._padded(rows, tokenizer.padding_side == "left")}

    def _padded(self, rows: np.ndarray, left: bool) -> Tensor:
        width = int(self.lengths[rows].max())
        out = np.zeros((len(rows), width, self.stored.shape[1]), dtype=self.stored.dtype)
        for index, row in enumerate(rows):
            length, start = int(self.lengths[row]), int(self.starts[row])
            columns = slice(width - length, width) if left else slice(0, length)
            out[index, columns] = self.stored[start : start + length]
        return self._tensor(out)

    def _tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor


def open_split(split: EncodedSplit, path: Path, dtype: torch.dtype, *, per_row: bool) -> FeatureSplit:
    """A split with the memory-mapped features of the entry at ``path``."""
    stored = np.load(path / FILE, mmap_mode="r", allow_pickle=False)
    return FeatureSplit(
        split.examples, split.lengths, split.weights, stored, dtype, per_row, starts(split.lengths),
        _columns(split) if per_row else {},
    )  # fmt: skip


def inputs_digest(split: EncodedSplit) -> str:
    """SHA-256 of a split's model inputs; labels and weights do not affect features."""
    digest = hashlib.sha256(split.lengths.tobytes())
    for name in MODEL_INPUTS:
        if name in split.examples.column_names:
            digest.update(name.encode())
            for table in split.examples.select_columns([name]).with_format("arrow").iter(batch_size=1000):
                values = table[name].combine_chunks().flatten()
                digest.update(values.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that compute features."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = ""
    return installed


def code_digest() -> str:
    """SHA-256 of the code that computes features from tokens."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for name in CODE:
        digest.update((package / name).read_bytes())
    return digest.hexdigest()


def _columns(split: EncodedSplit) -> dict[str, Tensor]:
    """The labels and weights as ``collate`` returns them."""
    table = split.examples.select_columns(["labels", "weight"]).with_format("arrow")[:]
    return {
        "labels": torch.tensor(table["labels"].to_pylist()),
        "weight": torch.tensor(table["weight"].to_pylist(), dtype=torch.float32),
    }


def starts(lengths: np.ndarray) -> np.ndarray:
    """Index of each row's first token, with the rows' tokens end to end."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]])


def as_array(hidden: Tensor) -> np.ndarray:
    """The tensor as an array of the dtype in ``STORED``."""
    hidden = hidden.contiguous()
    return (hidden.view(torch.uint16) if hidden.dtype == torch.bfloat16 else hidden).numpy()


def make_room(needed: int, limit_gb: float, keep: set[Path]) -> None:
    """Remove the least recently used entries until ``needed`` more bytes stay within the limit."""
    entries = [path for path in cache_folder("features").iterdir() if path.is_dir() and not path.name.startswith(".")]
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in entries}
    total = sum(sizes.values()) + needed
    for path in sorted(entries, key=lambda path: path.stat().st_mtime):
        if total <= limit_gb * GB:
            return
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]
