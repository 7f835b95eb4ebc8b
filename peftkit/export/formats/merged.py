"""The base with the adapter merged into it: W + (α/r) B A, one model that plain transformers loads.

Merged and saved in fp32, so that the model gives the adapter's outputs; it can be loaded in half precision.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from peftkit.errors import MethodError
from peftkit.export.exporter import Exporter
from peftkit.export.folder import ExportFolder
from peftkit.schema.registries import EXPORTERS


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
        from peftkit.export.loading import load_exported
        from peftkit.export.merging import unwrap_heads
        from peftkit.export.native_adapters import native_adapters

        loaded = load_exported(source, device="cpu", dtype="float32", quantized=False).loaded
        changes: dict[str, Any] = {"saves": "model", "quantization": None, "dtype": "float32"}
        contents = replace(source.manifest, **changes)
        batch = proof.sample_batch(loaded.tokenizer, contents)
        logits = proof.trained_logits(loaded, contents, batch)
        try:
            merged = loaded.model if native_adapters(loaded.model) else unwrap_heads(loaded.model.merge_and_unload())
        except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
            method = source.manifest.method
            raise MethodError(f"{source.path}: method '{method}' cannot be merged into the base ({error})") from error
        merged.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        library_files.write(folder, contents, merged.config, loaded.tokenizer)
        proven = None if tolerance is None else proof.prove_batch(folder, contents, batch, logits, tolerance)
        self.finish(source, folder, proven, **changes)
