"""Features of a frozen trunk, computed once and cached on disk for all later epochs, runs and sweeps.

The cache key covers the base model's files, the tokens of a split, the cut point, dtype, device, versions and this
code, but nothing above the cut point: head, labels, learning rate, dropout and seed. Linear probing on precomputed
features follows Alain & Bengio (2016, arXiv:1610.01644).
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftkit.data.batching import by_length, pass_tokens, steps_per_epoch
from peftkit.data.pipeline import EncodedData, EncodedSplit
from peftkit.distributed.session import Session
from peftkit.models.blocks import unwrap
from peftkit.schema.head import Head
from peftkit.schema.recipe import Recipe
from peftkit.system.cache import cache_folder, entry_lock, is_intact, new_entry
from peftkit.system.versions import installed_versions
from peftkit.training import feature_store as store
from peftkit.training.feature_store import FeatureSplit
from peftkit.training.frozen_trunk import FEATURES, HALF_TOLERANCE, TOLERANCE, FrozenTrunk, find_frozen_trunk
from peftkit.training.log import progress_bar
from peftkit.training.step import TaskModule

PROBE_ROWS = 4
BATCH_ROWS = 64


@dataclass
class FeaturePlan:
    """Whether the features of a run are cached, and where."""

    module: TaskModule
    recipe: Recipe
    encoded: EncodedData
    tokenizer: Any
    session: Session
    base: str
    """Fingerprint of the base model."""
    enabled: bool = False
    note: str = ""
    """The decision and its reason, for the user; empty if there is nothing to report."""
    trunk: FrozenTrunk = field(init=False)
    """Unset, like the rest, if the model has none."""
    dtype: torch.dtype = field(init=False)
    width: int = field(init=False)
    paths: dict[str, Path] = field(init=False)
    """The cache entry of each split."""

    def run(self, *, final: bool = True) -> EncodedData:
        """The data with features, computed unless they are cached; ``final=False`` leaves the test split as it is."""
        if not self.enabled:
            return self.encoded
        splits: dict[str, EncodedSplit] = {}
        for name, split in self.encoded.splits.items():
            splits[name] = self._with_features(name, split) if final or name != "test" else split
        return EncodedData(splits, self.encoded.fingerprint)

    def _length(self, split: EncodedSplit) -> int:
        """Number of vectors."""
        return len(split.lengths) if self.trunk.per_row else int(split.lengths.sum())

    def _bytes(self, split: EncodedSplit) -> int:
        """Size of a split's features on disk."""
        return self._length(split) * self.width * self.dtype.itemsize

    def _with_features(self, name: str, split: EncodedSplit) -> FeatureSplit:
        """A split with its features on disk; one process writes them, and the others wait."""
        path = self.paths[name]
        with entry_lock(path):
            if not (is_intact(path) and self._is_correct(split, path)):
                limit = self.recipe.training.feature_cache_gb
                store.make_room(self._bytes(split), limit, keep=set(self.paths.values()))
                with new_entry(path) as folder:
                    self._compute(name, split, folder / store.FILE)
            path.touch()
        return self._open(split, path)

    def _compute(self, name: str, split: EncodedSplit, file: Path) -> None:
        starts, shape = store.starts(split.lengths), (self._length(split), self.width)
        out = np.lib.format.open_memmap(file, mode="w+", dtype=store.STORED[self.dtype], shape=shape)
        tokens = pass_tokens(self.recipe.training, self.session.device.type)
        with progress_bar(f"features of {name}", len(split.lengths), shown=self.session.is_main) as advance:
            for batch in by_length(split.lengths, BATCH_ROWS, tokens, unpadded=self.module.unpadded):
                hidden, mask = self._capture(split, batch)
                if self.trunk.per_row:
                    out[batch] = store.as_array(hidden)
                else:
                    for index, row in enumerate(batch):
                        start = starts[row]
                        out[start : start + split.lengths[row]] = store.as_array(hidden[index][mask[index]])
                advance(len(batch))
        out.flush()

    def _capture(self, split: EncodedSplit, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The trunk's output for some rows, and their attention mask, on the CPU."""
        batch = self.session.on_device(split.batch(rows, self.tokenizer))
        self.module.eval()
        with torch.no_grad(), self.session.accelerator.autocast():
            hidden = self.trunk.capture(lambda: self.module(batch, outputs=True), batch)
        return hidden.cpu(), batch["attention_mask"].bool().cpu()

    def _is_correct(self, split: EncodedSplit, path: Path) -> bool:
        """Whether a few rows, computed again, have the stored features."""
        rows = probe_rows(split)[-1:] if self.module.unpadded else probe_rows(split)
        hidden, mask = self._capture(split, rows)
        stored = self._open(split, path).batch(rows, self.tokenizer)[FEATURES]
        if not self.trunk.per_row:
            hidden = hidden * mask[:, :, None]
        tolerance = TOLERANCE.get(self.dtype, HALF_TOLERANCE)
        difference = float((hidden.float() - stored.float()).abs().max())
        return hidden.shape == stored.shape and difference <= tolerance * float(hidden.float().abs().max())

    def _open(self, split: EncodedSplit, path: Path) -> FeatureSplit:
        return store.open_split(split, path, self.dtype, per_row=self.trunk.per_row)

    def find_trunk(self) -> bool:
        """Find the model's frozen trunk, and keep it in evaluation mode from now on; whether there is one."""
        train = self.encoded.splits["train"]
        batch = self.session.on_device(train.batch(probe_rows(train), self.tokenizer))
        forward = functools.partial(self.module.eval(), outputs=True)
        with self.session.accelerator.autocast():
            trunk, reason = find_frozen_trunk(self.module.model, forward, batch, self.module.pooling)
            if trunk is None:
                # where the method trains the first block anyway, there is nothing to report
                self.note = "" if "first block" in reason else f"features are not cached: {reason}"
                return False
            self.trunk = trunk
            self.module.freeze_trunk(trunk)
            with torch.no_grad():
                hidden = trunk.capture(lambda: forward(batch), batch)
        self.dtype, self.width = hidden.dtype, hidden.shape[-1]
        self.paths = {name: cache_folder("features") / self._key(split) for name, split in self.encoded.splits.items()}
        return True

    def decide(self) -> None:
        """Set ``enabled`` and ``note``, which reports size and limit before anything is computed."""
        training, folder, splits = self.recipe.training, cache_folder("features"), self.encoded.splits
        sizes = {name: self._bytes(split) for name, split in splits.items()}
        size = sum(sizes.values())
        missing = sum(sizes[name] for name in splits if not self.paths[name].is_dir())
        free = shutil.disk_usage(folder).free
        per_epoch = steps_per_epoch(splits["train"].lengths, training)
        epochs = min(training.epochs, (training.max_steps or 10**12) / per_epoch)
        needed = f"the features would need {size / store.GB:.2f} GB on disk"
        if training.feature_cache_gb == 0:
            decision = "recomputed in every epoch, since the cache is off (training.feature_cache_gb=0)"
        elif size > training.feature_cache_gb * store.GB:
            limit = f"training.feature_cache_gb allows {training.feature_cache_gb:g}"
            decision = f"recomputed in every epoch, since {needed} and {limit}"
        elif missing > free / 2:
            decision = f"recomputed in every epoch, since {needed} and {free / store.GB:.2f} GB are free"
        elif missing and epochs < 1:
            decision = "not cached, since training ends before it has seen every row once"
        else:
            self.enabled = True
            partly = "read from, or computed once and cached in,"
            how = {0: "read from", size: "computed once and cached in"}.get(missing, partly)
            decision = f"{how} {folder} ({size / 10**6:.1f} MB)"
        cut, of = self.trunk.cut, f"of {len(self.trunk.blocks)} blocks"
        blocks = f"the first {of} is" if cut == 1 else f"the first {cut} {of} are"
        frozen = "the backbone is" if self.trunk.is_backbone else blocks
        self.note = f"{frozen} frozen and run without dropout; the features are {decision}"

    def _key(self, split: EncodedSplit) -> str:
        """Digest of everything that a split's features depend on."""
        quantization, inner = self.recipe.quantization, unwrap(self.module.model)
        parts = {
            "base": self.base,
            "class": type(inner).__name__,
            "quantization": None if quantization is None else quantization.model_dump(mode="json"),
            "dtype": str(self.dtype),
            "device": self.session.device.type,
            "processor": torch.backends.cpu.get_cpu_capability(),
            "attention": inner.config._attn_implementation,
            "cut": self.trunk.cut,
            "kind": self.trunk.kind,
            "inputs": store.inputs_digest(split),
            "versions": installed_versions(store.PACKAGES),
            "code": store.code_digest(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def plan_features(
    module: TaskModule, recipe: Recipe, encoded: EncodedData, tokenizer: Any, session: Session, base: str
) -> FeaturePlan:
    """Find the frozen trunk of a module that is not wrapped yet, and decide whether its features are cached."""
    plan = FeaturePlan(module, recipe, encoded, tokenizer, session, base)
    plain_rows = type(module.head).collate is Head.collate  # a row is a sequence, which the features are stored by
    # NEFTune's noise is added to the embeddings, anew in every step
    if plain_rows and not recipe.training.neftune_alpha and plan.find_trunk():
        plan.decide()
    return plan


def probe_rows(split: EncodedSplit) -> np.ndarray:
    """A few rows from the shortest to the longest."""
    order = np.argsort(split.lengths, kind="stable")
    return order[np.unique(np.linspace(0, len(order) - 1, min(PROBE_ROWS, len(order))).astype(int))]
