"""An adapter that was computed, not trained: saved as peft does, and loaded by plain peft in a fresh process.

Its proof.json has the logits' comparison of any export, and in ``computed`` what it was computed from, how close it is
and how it scores.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.export import manifest, peft_files, proof
from peftkit.export.folder import ExportFolder
from peftkit.export.proof import FILE, Proof
from peftkit.models.blocks import unwrap
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from peftkit.export.exporter import Exporter


@dataclass(frozen=True)
class ComputedProof:
    """The proof of a computed adapter."""

    logits: Proof
    """Of the adapter in memory and of plain peft in a fresh process."""
    computed: dict[str, Any]
    summary: str

    def write(self, folder: Path) -> None:
        values = {**asdict(self.logits), "computed": self.computed, "summary": self.summary}
        (folder / FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def check(self, what: str) -> None:
        """Raises ExportError unless plain peft gives the same logits."""
        self.logits.check(what)


def save(
    exporter: Exporter, source: ExportFolder, folder: Path, loaded: LoadedModel, recipe: Recipe, *,
    computed: dict[str, Any], summary: str,
) -> None:  # fmt: skip
    """Writes the only adapter of a model with its tokenizer, proof and card.

    Args:
        loaded: in fp32 on the CPU.
        recipe: by which peftkit loads the adapter again.
        computed: for proof.json.
        summary: what was computed and how well it does, a sentence without its full stop.

    Raises:
        ExportError: plain peft gives other logits.
    """
    changes: dict[str, Any] = {
        "method": recipe.method.kind, "saves": manifest.SAVES[0], "quantization": None, "dtype": "float32",
    }  # fmt: skip
    contents = replace(source.manifest, **changes)
    for peft_config in loaded.model.peft_config.values():
        peft_config.base_model_name_or_path, peft_config.revision = contents.base, contents.revision
    peft_files.save(loaded.model, folder)
    unwrap(loaded.model).config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    batch = proof.sample_batch(loaded.tokenizer, contents)
    logits = proof.trained_logits(loaded, contents, batch)
    proven = proof.prove_batch(folder, contents, batch, logits, recipe.export.tolerance)
    loads = f"plain peft gave the computed adapter's logits within {proven.relative:.1g} of their standard deviation"
    exporter.finish(source, folder, ComputedProof(proven, computed, f"{loads}; {summary}"), recipe=recipe, **changes)
