"""Features on disk: the batches of a split that read them, digests for cache keys, and eviction."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from peftkit.data.batching import MODEL_INPUTS
from peftkit.data.pipeline import EncodedSplit
from peftkit.system.cache import cache_folder
from peftkit.training.frozen_trunk import FEATURES

FILE = "features.npy"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
"""Packages that compute features."""
STORED = {torch.bfloat16: np.uint16, torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}
"""numpy has no bf16: its bits are stored as integers."""
CODE = ("models/pooled_logits.py", "models/kernels/attention.py", "models/kernels/first_token.py",
        "models/kernels/rms_norm.py", "models/loading.py", "models/packing.py", "training/feature_store.py",
        "training/frozen_trunk.py")  # fmt: skip
"""Files that compute features from tokens: a change of them invalidates all features."""
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
    """``labels`` and ``weight`` of all rows as ``collate`` returns them, with one vector per row."""

    def batch(self, rows: np.ndarray, tokenizer: Any) -> dict[str, Tensor]:
        """The rows as padded tensors, with the trunk's output."""
        if self.per_row:
            ids = torch.zeros(len(rows), 1, dtype=torch.long)
            columns = {name: values[torch.from_numpy(rows)] for name, values in self.columns.items()}
            features = self._tensor(self.stored[rows])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **columns, FEATURES: features}
        spans = zip(self.starts[rows], self.lengths[rows])
        unpadded = [self._tensor(self.stored[start : start + length]) for start, length in spans]
        padded = pad_sequence(unpadded, batch_first=True, padding_side=tokenizer.padding_side)
        return {**super().batch(rows, tokenizer), FEATURES: padded}

    def _tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.array(values))  # a copy of what is mapped read-only
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor


def open_split(split: EncodedSplit, path: Path, dtype: torch.dtype, *, per_row: bool) -> FeatureSplit:
    """A split with the memory-mapped features of the entry at ``path``."""
    stored = np.load(path / FILE, mmap_mode="r", allow_pickle=False)
    columns: dict[str, Tensor] = {}
    if per_row:
        table = split.examples.select_columns(["labels", "weight"]).with_format("arrow")[:]
        weight = torch.tensor(table["weight"].to_pylist(), dtype=torch.float32)
        columns = {"labels": torch.tensor(table["labels"].to_pylist()), "weight": weight}
    return FeatureSplit(
        split.examples, split.lengths, split.weights, stored, dtype, per_row, starts(split.lengths), columns
    )


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


def code_digest() -> str:
    """SHA-256 of the code that computes features from tokens."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for name in CODE:
        digest.update((package / name).read_bytes())
    return digest.hexdigest()


def starts(lengths: np.ndarray) -> np.ndarray:
    """Index of each row's first token, with the rows' tokens end to end."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


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
