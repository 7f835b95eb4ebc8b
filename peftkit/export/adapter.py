"""Saves a trained model as peft and transformers do, so that they load it without peftkit, and proves that they can.

    adapter/  adapter_config.json  adapter_model.safetensors  config.json  tokenizer…  README.md
              peftkit.json  recipe.yaml  metrics.json  proof.json

Methods that train the base itself write ``model/``, with the whole model in place of the adapter's two files.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftkit.errors import ExportError, MethodError
from peftkit.export import card, library_files, manifest, native_adapters, peft_files, proof
from peftkit.export.exporter import exporter_of
from peftkit.export.folder import ExportFolder, open_export
from peftkit.export.formats.merged import Merged
from peftkit.export.manifest import Manifest
from peftkit.models import dtypes
from peftkit.models.blocks import unwrap
from peftkit.runs import choices
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import LoadedModel, TaskInfo
from peftkit.system.files import atomic_folder, write_json

Metrics = Mapping[str, Mapping[str, float]]


def export_run(
    path: Path, loaded: LoadedModel, recipe: Recipe, prepared: Any, encoded: Any, metrics: Metrics,
    tuned: Mapping[str, float] | None = None,
) -> Path:  # fmt: skip
    """Writes a run's ``adapter/`` (or ``model/``), and what else the recipe asks for: ``merged/``, ``onnx/``, ….

    Args:
        path: the run's folder.
        loaded: the trained model.
        prepared, encoded: the data; the proof uses a few held-out rows.
        metrics: final metrics by split, for the card.
        tuned: options of the head that were chosen on validation rows.

    Raises:
        ExportError: reloaded in a fresh process, the export gives other outputs. It is kept as ``adapter-unproven``.
    """
    contents = _contents(loaded, recipe, prepared.info, tuned)
    contents = replace(contents, choices=tuple(choice.summary for choice in choices.read(path)))
    target = path / contents.saves
    with atomic_folder(target) as folder:
        save(folder, loaded, recipe, contents, metrics)
        if recipe.export.prove:
            rows = proof.choose_rows(encoded, contents.head)
            proven = proof.prove(folder, loaded, contents, rows, recipe.export.tolerance)
            proven.write(folder)
            _check(proven, folder, target)
        card.write(folder, contents, recipe, metrics, card.usage(contents))
    if recipe.export.merge and contents.saves == "adapter":
        tolerance = recipe.export.tolerance if recipe.export.prove else None
        with atomic_folder(path / "merged") as folder:
            Merged().write(open_export(target), folder, tolerance=tolerance)
    for backend in recipe.export.backends:
        with atomic_folder(path / backend) as folder:
            exporter_of(backend).export(open_export(target), folder)
    return target


def check_backends(path: Path, loaded: LoadedModel, recipe: Recipe, info: TaskInfo) -> None:
    """Checks before a training that what it trains can be written for the recipe's ``export.backends``.

    Raises:
        MethodError: a format is not for this head or method.
        ModelError: packages that a format needs are missing.
    """
    for backend in recipe.export.backends:
        exporter = exporter_of(backend)
        source = ExportFolder(path, _contents(loaded, recipe, info), recipe)
        if reason := exporter.unsupported_reason(source):
            raise MethodError(f"export.backends: {backend}: {reason}")
        exporter.check_installed()


def _contents(
    loaded: LoadedModel, recipe: Recipe, info: TaskInfo, tuned: Mapping[str, float] | None = None
) -> Manifest:
    dtype = str(dtypes.dtype_for(recipe.model, next(loaded.model.parameters()).device)).removeprefix("torch.")
    return manifest.build_manifest(loaded, recipe, info, dtype, tuned)


def save(folder: Path, loaded: LoadedModel, recipe: Recipe, contents: Manifest, metrics: Metrics) -> None:
    """Writes weights, configs, tokenizer, recipe and metrics into an existing folder."""
    model = unwrap(loaded.model)
    if contents.saves == "model":
        state = {name: value.float() for name, value in loaded.model.state_dict().items() if value.is_floating_point()}
        model.save_pretrained(folder, state_dict=state)
    elif hasattr(loaded.model, "peft_config"):
        for peft_config in loaded.model.peft_config.values():
            peft_config.base_model_name_or_path, peft_config.revision = contents.base, contents.revision
        peft_files.save(loaded.model, folder)
    else:
        native_adapters.save(folder, loaded.model, contents.method, contents.base, contents.revision)
    config = copy.deepcopy(model.config)
    if recipe.quantization is not None and hasattr(config, "quantization_config"):
        del config.quantization_config  # the adapter fits the unquantized base as well; the card reports the training
    if contents.saves == "model":
        config.dtype = "float32"
    if contents.saves == "model" or not contents.head.embeds:
        config.save_pretrained(folder)
    # else the base's config serves: with one of its own, sentence-transformers would take the folder for a whole model
    loaded.tokenizer.save_pretrained(folder)
    library_files.write(folder, contents, model.config, loaded.tokenizer)
    manifest.write(folder, contents)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    write_json(folder / "metrics.json", metrics)


def _check(proven: proof.Proof, folder: Path, target: Path) -> None:
    """Raises ExportError if the proof failed; the export is kept under another name."""
    try:
        proven.check("reloaded in a fresh process")
    except ExportError as error:
        unproven = target.with_name(f"{target.name}-unproven")
        shutil.rmtree(unproven, ignore_errors=True)
        shutil.copytree(folder, unproven)
        raise ExportError(
            f"{error}. It is kept in {unproven} for inspection; the trained weights are in the run's checkpoints"
        ) from None
