"""Features of a frozen trunk, computed once and kept on disk: every later epoch, run and sweep reads them.

    plan = features.plan(module, recipe, encoded, tokenizer, session, fingerprint)
    data = plan.run()                        # the same splits, whose batches carry the trunk's output

The cache key covers the base's files, the tokens of one split, the cut point, dtype, device, versions and this code.
What is trained above the cut (head, learning rate, labels, dropout, seed) is not part of it. Linear probing on
precomputed features follows Alain & Bengio (2016, arXiv:1610.01644).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftkit.data.batching import by_length, pass_tokens, steps_per_epoch
from peftkit.data.pipeline import EncodedData, EncodedSplit
from peftkit.distributed.session import Session
from peftkit.models import classifier
from peftkit.schema.recipe import Recipe
from peftkit.system.cache import atomic_folder, cache_folder, entry_lock, is_intact
from peftkit.training import feature_store as store
from peftkit.training import frozen_trunk as trunks
from peftkit.training.feature_store import FeatureSplit
from peftkit.training.frozen_trunk import FrozenTrunk
from peftkit.training.log import bar
from peftkit.training.step import TaskModule

PROBE_ROWS = 4
BATCH_ROWS = 64


@dataclass
class Plan:
    """What is known before anything is computed."""

    module: TaskModule
    recipe: Recipe
    encoded: EncodedData
    tokenizer: Any
    session: Session
    base: str
    """Fingerprint of the base model."""
    trunk: FrozenTrunk | None = None
    dtype: torch.dtype = torch.float32
    width: int = 0
    active: bool = False
    note: str = ""
    """What was decided and why, for the user; empty where there is nothing to say."""
    found: dict[str, Path] = field(default_factory=dict)
    """Place of each split's entry."""

    def bytes_of(self, split: EncodedSplit) -> int:
        """Size of a split's features on disk."""
        assert self.trunk is not None
        count = len(split.lengths) if self.trunk.per_row else int(split.lengths.sum())
        return count * self.width * torch.empty((), dtype=self.dtype).element_size()

    def run(self, *, final: bool = True) -> EncodedData:
        """The data with features, computed where no earlier run left them; the data as they are where this is off.

        Args:
            final: False leaves the test split as it is.
        """
        if not self.active:
            return self.encoded
        splits: dict[str, EncodedSplit] = {}
        for name, split in self.encoded.splits.items():
            wanted = final or name != "test"
            splits[name] = self._open(split, self._entry(name, split)) if wanted else split
        return EncodedData(splits, self.encoded.fingerprint)

    def _entry(self, name: str, split: EncodedSplit) -> Path:
        """The split's entry on disk; of several processes one makes it, and the others wait for it."""
        path = self.found[name]
        with entry_lock(path):
            if not (is_intact(path) and self._agrees(split, path)):
                store.make_room(
                    self.bytes_of(split), self.recipe.training.feature_cache_gb, keep=set(self.found.values())
                )
                with atomic_folder(path) as folder:
                    self._compute(name, split, folder / store.FILE)
            path.touch()
        return path

    def _compute(self, name: str, split: EncodedSplit, file: Path) -> None:
        assert self.trunk is not None
        starts = store.starts(split.lengths)
        rows = len(split.lengths) if self.trunk.per_row else int(split.lengths.sum())
        out = np.lib.format.open_memmap(file, mode="w+", dtype=store.STORED[self.dtype], shape=(rows, self.width))
        tokens = pass_tokens(self.recipe.training, self.session.device.type)
        with bar(f"features of {name}", len(split.lengths), shown=self.session.is_main) as advance:
            for batch in by_length(split.lengths, BATCH_ROWS, tokens):
                hidden, mask = self._captured(split, batch)
                if self.trunk.per_row:
                    out[batch] = store.as_array(hidden)
                else:
                    for index, row in enumerate(batch):
                        start = starts[row]
                        out[start : start + split.lengths[row]] = store.as_array(hidden[index][mask[index]])
                advance(len(batch))
        out.flush()

    def _captured(self, split: EncodedSplit, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """What crosses the cut point for some rows, and their attention mask, on the CPU."""
        assert self.trunk is not None
        device = self.session.device
        batch = {name: tensor.to(device) for name, tensor in split.batch(rows, self.tokenizer).items()}
        self.module.eval()
        with torch.no_grad(), self.session.accelerator.autocast():
            hidden = self.trunk.capture(lambda: self.module(batch, outputs=True), batch)
        return hidden.cpu(), batch["attention_mask"].bool().cpu()

    def _agrees(self, split: EncodedSplit, path: Path) -> bool:
        """Whether a few rows, computed afresh, have the features that are stored."""
        opened = self._open(split, path)
        rows = probe_rows(split)
        hidden, mask = self._captured(split, rows)
        stored = opened.batch(rows, self.tokenizer)[trunks.FEATURES]
        assert self.trunk is not None
        if not self.trunk.per_row:
            hidden = hidden * mask[:, :, None]
        allowed = trunks.TOLERANCE.get(self.dtype, trunks.HALF_TOLERANCE)
        difference = float((hidden.float() - stored.float()).abs().max())
        return hidden.shape == stored.shape and difference <= allowed * float(hidden.float().abs().max())

    def _open(self, split: EncodedSplit, path: Path) -> FeatureSplit:
        assert self.trunk is not None
        return store.open_split(split, path, self.dtype, per_row=self.trunk.per_row)


def plan(module: TaskModule, recipe: Recipe, encoded: EncodedData, tokenizer: Any, session: Session, base: str) -> Plan:
    """Finds the model's frozen trunk, holds it in evaluation mode from now on, and decides whether features are kept.

    Args:
        module: the model under its task, not wrapped; its ``trunk`` is set.
        base: fingerprint of the base model.
    """
    made = Plan(module, recipe, encoded, tokenizer, session, base)
    if recipe.training.neftune_alpha:
        return made  # the noise is drawn below everything, anew at every step
    train = encoded.splits["train"]
    batch = {name: tensor.to(session.device) for name, tensor in train.batch(probe_rows(train), tokenizer).items()}
    module.eval()
    with session.accelerator.autocast():
        forward = _forward(module)
        found, reason = trunks.find_frozen_trunk(module.model, forward, batch, module.pooling)
        if found is None:
            made.note = _unused(module, reason)
            return made
        module.hold(found)
        made.trunk = found
        with torch.no_grad():
            hidden = found.capture(lambda: forward(batch), batch)
    made.dtype, made.width = hidden.dtype, hidden.shape[-1]
    made.found = {name: cache_folder("features") / _key(made, split) for name, split in encoded.splits.items()}
    _decide(made)
    return made


def probe_rows(split: EncodedSplit) -> np.ndarray:
    """A few rows from the shortest to the longest."""
    order = np.argsort(split.lengths, kind="stable")
    return order[np.unique(np.linspace(0, len(order) - 1, min(PROBE_ROWS, len(order))).astype(int))]


def _forward(module: TaskModule) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
    return lambda batch: module(dict(batch), outputs=True)


def _decide(made: Plan) -> None:
    """Sets ``active`` and ``note``: size and limit are told before anything is computed."""
    training = made.recipe.training
    size = sum(made.bytes_of(split) for split in made.encoded.splits.values())
    missing = sum(
        made.bytes_of(split) for name, split in made.encoded.splits.items() if not (made.found[name]).is_dir()
    )
    what = _what(made)
    limit = training.feature_cache_gb * store.GB
    free = shutil.disk_usage(cache_folder("features")).free
    if limit == 0:
        said = f"{what}; the cache is off (training.feature_cache_gb=0), so they are computed in every epoch"
    elif size > limit:
        said = (
            f"{what}, which would take {size / store.GB:.2f} GB on disk and training.feature_cache_gb allows "
            f"{training.feature_cache_gb:g}: they are computed in every epoch"
        )
    elif missing > free / 2:
        said = (
            f"{what}, which would take {size / store.GB:.2f} GB of {free / store.GB:.2f} free: they are computed in "
            "every epoch"
        )
    elif missing and _passes(made) < 1:
        said = f"{what}; training ends before it has seen every row once, so they are not kept"
    else:
        made.active = True
        how = "computed once and kept" if missing == size else "read" if not missing else "read or computed once"
        said = f"{what}: {how} in {cache_folder('features')} ({size / 10**6:.1f} MB)"
    made.note = said


def _what(made: Plan) -> str:
    assert made.trunk is not None
    if not made.trunk.whole:
        below = f"the first {made.trunk.cut} of {len(made.trunk.blocks)} blocks are frozen"
        return f"{below}, and held without dropout; what leaves them is fixed"
    return "the backbone is frozen, and held without dropout; what leaves it is fixed"


def _unused(module: TaskModule, reason: str) -> str:
    """Nothing is said where the method trains the first block anyway: there is nothing to compute once."""
    return "" if "first block" in reason else f"no features are kept: {reason}"


def _passes(made: Plan) -> float:
    training = made.recipe.training
    per_epoch = steps_per_epoch(made.encoded.splits["train"].lengths, training)
    return min(training.epochs, (training.max_steps or 10**12) / per_epoch)


def _key(made: Plan, split: EncodedSplit) -> str:
    """Everything that a split's features depend on."""
    trunk, recipe = made.trunk, made.recipe
    assert trunk is not None
    inner = classifier.unwrap(made.module.model)
    parts = {
        "base": made.base,
        "class": type(inner).__name__,
        "quantization": None if recipe.quantization is None else recipe.quantization.model_dump(mode="json"),
        "dtype": str(made.dtype),
        "device": made.session.device.type,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "attention": inner.config._attn_implementation,
        "cut": trunk.cut,
        "kind": trunk.kind,
        "inputs": store.inputs_digest(split),
        "versions": store.versions(),
        "code": store.code_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
