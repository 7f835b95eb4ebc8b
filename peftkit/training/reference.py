"""What the untrained model makes of the rows, computed once and cached on disk for all later epochs and runs.

Losses over preferences compare the model with the one that training began with: the base, or an adapter that is trained
further. A method that starts as the base's own outputs, or as that adapter's, needs no second model for that: these are
computed before the first step, and before a checkpoint is restored.
The cache key covers the base, the tokens, dtype, device, versions and code, but nothing that only training depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftkit.data.batching import pass_tokens
from peftkit.data.pipeline import EncodedData, EncodedSplit
from peftkit.distributed.session import Session
from peftkit.evaluation.runner import predict
from peftkit.models.blocks import unwrap
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import LoadedModel
from peftkit.system.cache import cache_folder, entry_lock, is_intact, new_entry
from peftkit.system.versions import installed_versions
from peftkit.training import feature_store
from peftkit.training.log import progress_bar
from peftkit.training.step import TaskModule

KIND = "reference"
COLUMNS = ("input_ids", "labels", "mismatched_ids", "mismatched_labels")


@dataclass(frozen=True)
class ReferenceSplit(EncodedSplit):
    """A split whose batches carry the reference's outputs."""

    reference: Mapping[str, np.ndarray] = field(default_factory=dict, kw_only=True, repr=False)
    """[rows], or [rows, most of a row] padded with NaN, by name."""

    @classmethod
    def with_outputs(cls, split: EncodedSplit, reference: Mapping[str, np.ndarray]) -> ReferenceSplit:
        """The split with these outputs of its rows."""
        return cls(split.examples, split.lengths, split.weights, head=split.head, reference=reference)

    def select(self, rows: np.ndarray) -> ReferenceSplit:
        return self.with_outputs(super().select(rows), {name: array[rows] for name, array in self.reference.items()})

    def batch(self, rows: np.ndarray, tokenizer: Any) -> dict[str, torch.Tensor]:
        stored = {name: torch.from_numpy(np.array(array[rows])) for name, array in self.reference.items()}
        return super().batch(rows, tokenizer) | stored


@dataclass
class Reference:
    """Computes, or reads from the cache, what a run's reference makes of its splits."""

    loaded: LoadedModel
    module: TaskModule
    """Not wrapped yet."""
    recipe: Recipe
    tokenizer: Any
    session: Session

    def add(self, encoded: EncodedData, *, final: bool = True) -> EncodedData:
        """The data with the reference's outputs in the splits whose batches need them; without ``final`` not the test.

        To be called while the model is untrained; on every process.
        """
        wanted = [name for name in self.module.head.reference_splits() if name in encoded.splits]
        wanted = [name for name in wanted if final or name != "test"]
        added = {name: self._with_outputs(name, encoded.splits[name]) for name in wanted}
        return EncodedData({**encoded.splits, **added}, encoded.fingerprint) if added else encoded

    def _with_outputs(self, name: str, split: EncodedSplit) -> ReferenceSplit:
        path = cache_folder(KIND) / self._key(split)
        with entry_lock(path) if self.session.is_main else nullcontext():
            # only the main process has the cache for sure: others may be on other machines
            outputs = self.session.run_on_main(lambda: read(path) if is_intact(path) else None)
            if outputs is None:
                outputs = self._compute(name, split)
                if self.session.is_main:
                    write(path, outputs)
        return ReferenceSplit.with_outputs(split, outputs)

    def _compute(self, name: str, split: EncodedSplit) -> dict[str, np.ndarray]:
        session, tokens = self.session, pass_tokens(self.recipe.training, self.session.device.type)
        off = nullcontext() if self.recipe.starts_as_compared else self.loaded.model.disable_adapter()
        with off, progress_bar(f"reference of {name}", len(split.lengths), shown=session.is_main) as advance:
            return reference_outputs(
                self.module, split, self.tokenizer, device=session.device, tokens=tokens,
                autocast=session.accelerator.autocast, rank=session.rank, world_size=session.world_size,
                progress=advance,
            )  # fmt: skip

    def _key(self, split: EncodedSplit) -> str:
        """Digest of everything that the outputs depend on."""
        recipe, inner, head = self.recipe, unwrap(self.module.model), self.module.head
        parts = {
            "base": self.loaded.fingerprint,
            "adapter": [self.loaded.adapter, recipe.method.model_dump(mode="json")] if self.loaded.adapter else None,
            "model": recipe.model.model_dump(mode="json", exclude={"offload"}),
            "quantization": None if recipe.quantization is None else recipe.quantization.model_dump(mode="json"),
            "head": f"{type(head).__module__}.{type(head).__qualname__}",
            "dtype": str(self.session.dtype),
            "device": self.session.device.type,
            "processor": torch.backends.cpu.get_cpu_capability(),
            "attention": inner.config._attn_implementation,
            "inputs": inputs_digest(split),
            "versions": installed_versions(feature_store.PACKAGES),
            "code": code_digest(type(head)),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def reference_outputs(module: TaskModule, split: EncodedSplit, tokenizer: Any, **options: Any) -> dict[str, np.ndarray]:
    """``Head.reference_outputs`` of every example of a split, by name; options as of ``evaluation.runner.predict``."""

    def forward(batch: dict[str, torch.Tensor], *, outputs: bool) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = module(batch, use="reference_outputs")
        return result

    module.eval()
    return predict(forward, split, tokenizer, fill=np.nan, unpadded=module.unpadded, **options)


def write(path: Path, outputs: Mapping[str, np.ndarray]) -> None:
    """Writes a cache entry."""
    with new_entry(path) as folder:
        for name, array in outputs.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a cache entry, memory-mapped."""
    files = sorted(path.glob("*.npy"))
    return {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in files}


def inputs_digest(split: EncodedSplit) -> str:
    """SHA-256 of a split's tokens, and of which of them are scored."""
    digest = hashlib.sha256()
    for name in COLUMNS:
        if name in split.examples.column_names:
            digest.update(name.encode())
            for table in split.examples.select_columns([name]).with_format("arrow").iter(batch_size=1000):
                column = table[name].combine_chunks()
                digest.update(np.asarray(column.value_lengths(), dtype=np.int64).tobytes())
                digest.update(column.flatten().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()


def code_digest(head: type) -> str:
    """SHA-256 of the code that computes the outputs."""
    import inspect

    package, digest = Path(__file__).parents[1], hashlib.sha256()
    names = ("models/kernels/linear_cross_entropy.py", *feature_store.CODE)
    for file in [*(package / name for name in names), Path(inspect.getfile(head))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
