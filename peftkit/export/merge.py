"""The base with the adapter merged into it: W + (α/r) B A, one model that plain transformers loads.

Merging is done in fp32 and kept in fp32, so that the merged model gives the adapter's outputs; whoever needs it
smaller can load it in half precision.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from peftkit.errors import ExportError, MethodError
from peftkit.export import card, manifest
from peftkit.export.in_memory import with_heads
from peftkit.export.weight_changes import deltas_of
from peftkit.schema.recipe import Recipe
from peftkit.system.files import atomic_folder

SAMPLE = "The quick brown fox jumps over the lazy dog."


def merge(adapter: Path, target: Path, *, tolerance: float | None) -> Path:
    """Writes the merged model of an exported adapter to ``target``.

    Args:
        adapter: an ``adapter/`` folder.
        target: the folder to write; replaced when it exists.
        tolerance: as ``export.tolerance``; None skips the proof.

    Raises:
        MethodError: the adapter's method cannot be merged.
        ExportError: the merged model gives other outputs than base and adapter.
    """
    from dataclasses import replace

    about = manifest.read(adapter)
    model, tokenizer = _load_fp32(adapter)
    batch, before = _outputs(model, tokenizer, about)
    try:
        merged = model if deltas_of(model) else with_heads(model.merge_and_unload())
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        raise MethodError(f"{adapter}: method '{about.method}' cannot be merged into the base ({error})") from error
    with atomic_folder(target) as stage:
        merged.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        whole = replace(about, saves="model", quantization=None, dtype="float32")
        manifest.write(stage, whole)
        for name in ("recipe.yaml", "metrics.json"):
            shutil.copy2(adapter / name, stage / name)
        if tolerance is not None:
            _prove(stage, whole, batch, before, tolerance)
        recipe = Recipe.from_yaml(stage / "recipe.yaml")
        card.write(stage, whole, recipe, json.loads((stage / "metrics.json").read_text(encoding="utf-8")))
    return target


def _load_fp32(adapter: Path) -> tuple[Any, Any]:
    """Base and adapter in fp32, unquantized, on the CPU."""
    from peftkit.export.loading import load_exported

    loaded = load_exported(adapter, dtype="float32", quantized=False).loaded
    return loaded.model, loaded.tokenizer


@torch.no_grad()
def _outputs(model: Any, tokenizer: Any, about: manifest.Manifest) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    texts = [SAMPLE, SAMPLE.upper(), f"{SAMPLE} {SAMPLE}", "?"]
    batch = about.head.text_batch(texts, tokenizer)
    return batch, about.head.plain_logits(model, batch, about.pooling)


def _prove(
    stage: Path, about: manifest.Manifest, batch: dict[str, torch.Tensor], before: torch.Tensor, tolerance: float
) -> None:
    from peftkit.export import proof

    found = proof.compare(stage, proof.job_for(about, stage, torch.device("cpu")), batch, before, tolerance)
    if not found.passed:
        raise ExportError(
            f"the merged model's logits differ from those of base and adapter by {found.relative:.2g} of their spread; "
            f"export.tolerance allows {tolerance:g}"
        )
