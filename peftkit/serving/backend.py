"""Which form of a run is served: the run itself, or an export in its folder that answers faster on this machine.

An export is used if its proof passed and it was made of the run as it is now. So `peftkit export RUN --to RUN/onnx
--format onnx` once makes `peftkit serve RUN` faster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from peftkit.export import manifest, proof
from peftkit.export.folder import ExportFolder, open_export
from peftkit.export.manifest import Manifest
from peftkit.models import dtypes
from peftkit.schema.registries import EXPORTERS
from peftkit.system.files import is_staging

METRICS = "metrics.json"
"""Copied into every export: those of a run that was trained again differ."""


@dataclass(frozen=True)
class Backend:
    """What is served."""

    export: ExportFolder
    reason: str
    """What computes, and why, as the first lines of the server print it."""
    unused: tuple[str, ...] = ()
    """Exports of the run that are not used, each with the reason."""


def choose(run: Path, *, itself: str = "") -> Backend:
    """The fastest proven form of a run.

    Args:
        itself: why the run itself is needed, whatever exports there are; empty if it is not.

    Raises:
        RunError: not a finished run.
    """
    own = open_export(run)
    plain = Backend(own, f"{_library(own)} (the run itself{': ' if itself else ''}{itself})")
    if itself or own.manifest.saves not in manifest.SAVES:
        return plain
    if torch.cuda.is_available():
        return replace(plain, reason=f"{_library(own)} (the run itself: exports for CPUs are not used with a GPU)")
    best, best_speed, unused = plain, 1.0, []
    for export in _exports_in(run if run.is_dir() else own.path):
        speed = EXPORTERS.get(export.manifest.saves)().speed(export.manifest)
        if not speed:  # of a format that others serve
            continue
        if reason := _unusable_reason(export, own):
            unused.append(f"{export.path} is not used: {reason}")
        elif speed > best_speed:
            values = proof.read(export.path) or {}
            agreement = f", same answer for {values['same_choice']:.1%}" if "same_choice" in values else ""
            best = Backend(export, f"{_library(export)} ({export.path}, proven{agreement})")
            best_speed = speed
    return replace(best, unused=tuple(unused))


def _exports_in(folder: Path) -> list[ExportFolder]:
    """Exports in formats other than the run's own, directly in its folder."""
    folders = [path.parent for path in sorted(folder.glob(f"*/{manifest.FILE}")) if not is_staging(path.parent)]
    exports = [open_export(path) for path in folders]
    return [export for export in exports if export.manifest.saves not in manifest.SAVES]


def _unusable_reason(export: ExportFolder, own: ExportFolder) -> str:
    """Why an export cannot be served in place of the run; empty if it can."""
    same_training = (export.path / METRICS).read_bytes() == (own.path / METRICS).read_bytes()
    if _trained(export.manifest) != _trained(own.manifest) or not same_training:
        return "it was made of another training; export the run again"
    if not (proof.read(export.path) or {}).get("passed"):
        return "nothing was proven of it; export the run again"
    return ""


def _trained(contents: Manifest) -> Manifest:
    """What an export has in common with its run."""
    return replace(contents, saves="model", dtype="", quantization=None, max_length=1)


def _library(export: ExportFolder) -> str:
    """What computes an export's answers, and in which dtype."""
    contents = export.manifest
    if contents.saves in manifest.SAVES:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = str(dtypes.dtype_for(export.recipe.model, device)).removeprefix("torch.")
        return f"torch in {contents.quantization['kind'] if contents.quantization else dtype}"
    return f"{EXPORTERS.get(contents.saves)().usage(contents).library} in {contents.dtype}"
