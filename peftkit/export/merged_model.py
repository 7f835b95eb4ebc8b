"""An export's model in fp32 with its adapter merged, for formats of whole models."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit.errors import MethodError
from peftkit.export import manifest, proof
from peftkit.export.folder import ExportFolder
from peftkit.export.loading import load_exported
from peftkit.export.manifest import Manifest
from peftkit.export.merging import unwrap_heads
from peftkit.export.native_adapters import native_adapters
from peftkit.schema.types import LoadedModel

POOLING = "1_Pooling/config.json"


@dataclass(frozen=True)
class MergedModel:
    """A plain transformers model, on the CPU in fp32."""

    loaded: LoadedModel
    contents: Manifest
    """Of the merged model."""
    batch: dict[str, Tensor]
    """A few texts, tokenized."""
    logits: Tensor
    """Of those texts, before merging."""

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.loaded.model

    def check(self, tolerance: float) -> None:
        """Raises ExportError unless merging left the logits as they were."""
        logits = proof.trained_logits(self.loaded, self.contents, self.batch)
        rows = len(self.batch["input_ids"])
        proof.compare_logits(logits, self.logits, tolerance, rows=rows, dtype="float32").check("merged into the base")


def merge_export(source: ExportFolder) -> MergedModel:
    """Loads an export and merges its adapter by peft's own code; a method that trains the base itself has none.

    Raises:
        MethodError: peft cannot merge this adapter.
    """
    loaded = load_exported(source, device="cpu", dtype="float32", quantized=False).loaded
    changes: dict[str, Any] = {"saves": "model", "quantization": None, "dtype": "float32"}
    contents = replace(source.manifest, **changes)
    batch = proof.sample_batch(loaded.tokenizer, contents)
    logits = proof.trained_logits(loaded, contents, batch)
    if source.manifest.saves == manifest.SAVES[0] and not native_adapters(loaded.model):
        try:
            loaded.model = unwrap_heads(loaded.model.merge_and_unload())
        except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
            method = source.manifest.method
            raise MethodError(f"{source.path}: method '{method}' cannot be merged into the base ({error})") from error
    return MergedModel(loaded, contents, batch, logits)


def copy_pooling(source: ExportFolder, folder: Path) -> None:
    """Adds a sentence encoder's declaration of its pooling, which its merged model keeps, to a merged folder."""
    base, target = Path(source.manifest.base) / POOLING, folder / POOLING
    if base.is_file() and not target.exists():
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(base, target)
