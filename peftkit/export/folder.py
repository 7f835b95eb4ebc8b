"""An exported folder: where it is, in a run or on the hub, and what its metadata say; no weights are read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import ModelError, RunError
from peftkit.export import hub, manifest
from peftkit.export.manifest import Manifest
from peftkit.models.sources import PICKLED
from peftkit.schema.recipe import Recipe
from peftkit.system.files import file_digest, is_staging

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
COPIED = ("recipe.yaml", "metrics.json")
"""Files of a run's export that its exports in other formats hold, too."""


@dataclass(frozen=True)
class ExportFolder:
    """An exported folder that was checked, with its metadata read once."""

    path: Path
    manifest: Manifest
    recipe: Recipe


def open_export(path: str | Path) -> ExportFolder:
    """The export of a run, in an exported folder, or of ``hub:USER/NAME[@REVISION]``.

    Raises:
        RunError: not a finished run of peftkit.
        ModelError: the folder holds pickled weights, or files of the hub are not those that were pushed.
        HubError: the hub cannot be reached, or there is no such repository or revision.
    """
    folder = find_export(Path(path))
    contents = manifest.read(folder)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise ModelError(
            f"{folder}: holds {', '.join(pickled)}, which peftkit never writes and which can run code when opened; "
            "remove it, or export the run again"
        )
    return ExportFolder(folder, contents, Recipe.from_yaml(folder / "recipe.yaml"))


def weights_digest(folder: Path) -> str:
    """SHA-256 over the safetensors files of an exported folder, with their names."""
    files = {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def find_export(path: Path) -> Path:
    """The exported folder of a run or of ``hub:USER/NAME``, or ``path`` itself; raises RunError if there is none."""
    if hub.is_hub_name(path):
        return hub.download(path)
    if is_staging(path.resolve()):
        raise RunError(f"{path}: the rest of an export that was interrupted; remove it, and export the run again")
    if not path.is_dir():
        raise RunError(f"{path}: there is no such folder; expected a run, or its adapter/ or model/")
    for folder in (path, path / "adapter", path / "model"):
        if (folder / manifest.FILE).is_file():
            return folder
    if (path / "checkpoints").is_dir():
        raise RunError(
            f"{path}: this run has not finished, so there is nothing to load; resume it with --resume {path}"
        )
    if (path / ADAPTER_CONFIG).is_file():
        raise RunError(f"{path}: peftkit did not write this adapter; load it with peft.PeftModel.from_pretrained")
    raise RunError(f"{path}: not a run of peftkit: no {manifest.FILE} in it, nor in its adapter/ or model/")
