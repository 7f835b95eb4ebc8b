"""The base with the adapter merged into it: W + (α/r) B A, one model that plain transformers loads.

Merged and saved in fp32, so that the model gives the adapter's outputs; it can be loaded in half precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from peftkit.errors import ModelError
from peftkit.export.exporter import Exporter
from peftkit.export.folder import ExportFolder, open_export
from peftkit.schema.registries import EXPORTERS

if TYPE_CHECKING:
    from peftkit.schema.recipe import ModelConfig


@EXPORTERS.register("merged")
class Merged(Exporter):
    """One plain transformers model: the adapter merged into its base, in fp32."""

    kind: Literal["merged"] = "merged"

    def unsupported_reason(self, source: ExportFolder) -> str:
        if source.manifest.saves != "adapter":
            method = source.manifest.method
            return f"method '{method}' trained the base itself, so there is nothing to merge; leave --merge out"
        reason = source.recipe.method.unmergeable_reason()
        return f"{reason}; leave --merge out" if reason else ""

    def export(self, source: ExportFolder, folder: Path) -> None:
        """Merges by peft's own code and compares the saved model with base and adapter.

        Raises:
            MethodError: peft cannot merge this adapter.
            ExportError: the merged model gives other outputs.
        """
        self.write(source, folder, tolerance=source.recipe.export.tolerance)

    def write(self, source: ExportFolder, folder: Path, *, tolerance: float | None) -> None:
        """``export`` with another tolerance than the recipe's; None skips the proof."""
        from peftkit.export import library_files, proof
        from peftkit.export.merged_model import merge_export

        merged = merge_export(source)
        merged.model.save_pretrained(folder)
        merged.loaded.tokenizer.save_pretrained(folder)
        library_files.write(folder, merged.contents, merged.model.config, merged.loaded.tokenizer)
        proven = None
        if tolerance is not None:
            proven = proof.prove_batch(folder, merged.contents, merged.batch, merged.logits, tolerance)
        self.finish(source, folder, proven, saves="model", quantization=None, dtype="float32")

    def write_base(self, adapter: Path, base: ModelConfig | None, folder: Path) -> None:
        """Writes the model that a second training stands on, proven like any export.

        Args:
            adapter: a run's export, or a folder that peft wrote.
            base: what a peft adapter is merged into; None for a run's, whose recipe names it.

        Raises:
            ModelError: it cannot be merged, or does not fit its base.
            ExportError: the merged model gives other outputs.
        """
        if base is not None:
            from peftkit.export.foreign import merge_foreign

            merge_foreign(adapter, base, folder)
            return
        from peftkit.export.merged_model import copy_pooling

        source = open_export(adapter)
        if reason := self.unsupported_reason(source).removesuffix("; leave --merge out"):
            raise ModelError(f"{adapter}: another training cannot stand on this run: {reason}")
        self.write(source, folder, tolerance=source.recipe.export.tolerance)
        copy_pooling(source, folder)
