"""An adapter of another method, or a model that was trained whole, as the LoRA of least error.

For servers that only know LoRA, such as vLLM and llama.cpp. Each linear layer's ΔW is cut to its largest singular
values; see ``peftkit.export.low_rank``. What a LoRA cannot hold (norms, biases, embeddings) is left out and named. The
run's metrics on held-out rows, before and after, are in proof.json and on the card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from peftkit.export import manifest
from peftkit.export.exporter import Exporter
from peftkit.export.folder import ExportFolder
from peftkit.schema.recipe import replace as with_fields
from peftkit.schema.registries import EXPORTERS, METHODS


@EXPORTERS.register("lora")
class AsLora(Exporter):
    """The weight change of any method as a plain LoRA for peft, with its error and the task's metrics."""

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rank of every layer; "auto" takes the smallest that meets ``max_error``, at most 256."""
    max_error: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """With rank=auto, the part of the weights' change that may be lost, as a ratio of norms."""
    rows: Annotated[int, Field(ge=0)] = 200
    """Held-out rows that the model is scored on before and after; 0 for none."""

    def unsupported_reason(self, source: ExportFolder) -> str:
        if source.manifest.saves not in manifest.SAVES:
            return f"{source.path} is an export of format '{source.manifest.saves}'; export the run itself"
        reason = source.recipe.method.unmergeable_reason() if source.manifest.saves == "adapter" else ""
        return f"{reason}, so there is no change of weights that a LoRA could hold" if reason else ""

    def export(self, source: ExportFolder, folder: Path) -> None:
        """Compares the trained weights with the base's and writes their difference.

        Raises:
            MethodError: no linear layer was changed.
            ExportError: plain peft does not load the adapter as it was computed.
        """
        from peftkit.export import computed_adapter, low_rank
        from peftkit.export.held_out import HeldOutRows, listed
        from peftkit.export.loading import load_base_of
        from peftkit.export.merged_model import merge_export

        merged, base = merge_export(source), load_base_of(source)
        held_out = HeldOutRows(source.recipe, source.manifest.info, self.rows) if self.rows else None
        before = held_out.score(merged.loaded) if held_out else {}
        heads = merged.loaded.head_names
        deltas, others = low_rank.differences(base.model, merged.model, heads)
        most = low_rank.LARGEST_RANK if self.rank == "auto" else self.rank
        factors = {name: low_rank.factorize(delta, most) for name, delta in deltas.items()}
        rank = low_rank.choose_rank(factors, self.max_error) if self.rank == "auto" else self.rank
        error = low_rank.relative_error(factors, rank)
        low_rank.copy_heads(base.model, merged.model, heads)
        low_rank.attach(base, factors, rank)
        base.model.requires_grad_(False).eval()
        after = held_out.score(base) if held_out else {}
        names = source.manifest.head.metric_names(source.recipe.evaluation)
        computed = {
            "method": source.manifest.method, "rank": rank, "relative_error": error, "layers": len(factors),
            "errors": {name: low_rank.relative_error({name: one}, rank) for name, one in factors.items()},
            "left_out": others, "split": held_out.split if held_out else None, "before": before, "after": after,
        }  # fmt: skip
        summary = (
            f"a LoRA of rank {rank} holds the change of method '{source.manifest.method}' in {len(factors)} layers, "
            f"with a relative error of {error:.2g}"
        )
        if others:
            summary += f"; {len(others)} other parameters that were trained are left out, such as {others[0]}"
        if held_out:
            summary += f"; on {len(held_out)} rows of the {held_out.split} split: {listed(before, names)} before, "
            summary += f"{listed(after, names)} after"
        method = METHODS.get(self.kind)(rank=rank, alpha=rank, target_modules=sorted(factors)).model_dump()
        recipe = with_fields(source.recipe, method=method, quantization=None)
        computed_adapter.save(self, source, folder, base, recipe, computed=computed, summary=summary)
