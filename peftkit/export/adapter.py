"""Saves a trained model the way peft and transformers do, so that they load it without us, and proves that they can.

    adapter/  adapter_config.json  adapter_model.safetensors  config.json  tokenizer…  README.md
              peftkit.json  recipe.yaml  metrics.json  proof.json

Methods that train the base itself write ``model/`` with the whole model in place of the adapter's two files.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import ExportError
from peftkit.export import card, manifest, own_format
from peftkit.export.manifest import Manifest
from peftkit.models import dtypes
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import LoadedModel
from peftkit.system.files import atomic_folder

Figures = Mapping[str, Mapping[str, float]]
UNPROVEN = "-unproven"


def export_run(path: Path, loaded: LoadedModel, recipe: Recipe, prepared: Any, encoded: Any, metrics: Figures) -> Path:
    """Writes a run's ``adapter/`` (or ``model/``), and ``merged/`` where the recipe asks for it.

    Args:
        path: the run's folder.
        loaded: the trained model.
        prepared, encoded: the data, of which a few held-out rows serve as the proof's input.
        metrics: final figures by split, for the card.

    Raises:
        ExportError: reloaded in a fresh process, the export gives other outputs. It is kept as ``adapter-unproven``.
    """
    from peftkit.export import merge, proof

    dtype = str(dtypes.dtype_for(recipe.model, next(loaded.model.parameters()).device)).removeprefix("torch.")
    about = manifest.build_manifest(loaded, recipe, prepared.info, dtype)
    target = path / about.saves
    with atomic_folder(target) as stage:
        save(stage, loaded, recipe, about, metrics)
        if recipe.export.prove:
            rows = proof.choose_rows(encoded, about.head)
            found = proof.prove(stage, loaded, about, rows, recipe.export.tolerance)
            _keep_when_wrong(stage, target, found)
        card.write(stage, about, recipe, metrics)
    if recipe.export.merge and about.saves == "adapter":
        merge.merge(target, path / "merged", tolerance=recipe.export.tolerance if recipe.export.prove else None)
    return target


def save(folder: Path, loaded: LoadedModel, recipe: Recipe, about: Manifest, metrics: Figures) -> None:
    """Writes weights, configs, tokenizer, recipe and figures into an existing folder."""
    from peftkit.models.classifier import unwrap

    if about.saves == "adapter":
        _save_adapter(folder, loaded, about)
    else:
        state = {name: tensor.float() for name, tensor in _state(loaded.model).items()}
        unwrap(loaded.model).save_pretrained(folder, state_dict=state)
    config = copy.deepcopy(unwrap(loaded.model).config)
    if recipe.quantization is not None and hasattr(config, "quantization_config"):
        del config.quantization_config  # the adapter fits the whole base as well; the card says how it was trained
    if about.saves == "model":
        config.dtype = "float32"
    config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    manifest.write(folder, about)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _save_adapter(folder: Path, loaded: LoadedModel, about: Manifest) -> None:
    if not hasattr(loaded.model, "peft_config"):
        own_format.save(folder, loaded.model, about.method, about.base, about.revision)
        return
    for config in loaded.model.peft_config.values():
        config.base_model_name_or_path = about.base
        config.revision = about.revision
    # left to itself peft asks the hub whether the base's embeddings were resized
    loaded.model.save_pretrained(folder, save_embedding_layers=False)


def _state(model: Any) -> dict[str, Any]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def _keep_when_wrong(stage: Path, target: Path, found: Any) -> None:
    if found.passed:
        return
    kept = target.with_name(target.name + UNPROVEN)
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(stage, kept)
    raise ExportError(
        f"reloaded in a fresh process, the export's logits differ from the trained model's by {found.relative:.2g} of "
        f"their spread; export.tolerance allows {found.tolerance:g}. It is kept in {kept} for a look; the trained "
        "weights are in the run's checkpoints"
    )
