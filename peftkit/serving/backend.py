"""Which form of a run is served: the run itself, or an export in its folder that answers faster on this machine.

An export is used if its proof passed and it was written from the run's weights (``export.runtimes``). So `peftkit
export RUN --to RUN/onnx --format onnx` once makes `peftkit serve RUN` faster. There are no texts as yet on which
runtimes could be measured, as `predict` measures them: their usual speeds decide (``Exporter.speed``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from peftkit.export import manifest, proof, runtimes
from peftkit.export.folder import ExportFolder, open_export
from peftkit.models import dtypes
from peftkit.schema.registries import EXPORTERS, runtime_formats


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
    for name in runtime_formats():
        folder, exporter = runtimes.home(own) / name, EXPORTERS.get(name)
        if not folder.is_dir():
            continue
        export, problem = runtimes.proven(own, name)
        if exporter.rounds and name not in own.recipe.export.backends:
            export, problem = None, "rounds, which `export.backends` of the recipe allows; or serve it by its own path"
        if export is None:
            unused.append(f"{folder} is not used: it {problem}")
        elif (speed := exporter().speed(export.manifest)) > best_speed:
            agreement = (proof.read(export.path) or {}).get("same_choice")
            shown = "" if agreement is None else f", same answer for {agreement:.1%}"
            best, best_speed = Backend(export, f"{_library(export)} ({export.path}, proven{shown})"), speed
    return replace(best, unused=tuple(unused))


def _library(export: ExportFolder) -> str:
    """What computes an export's answers, and in which dtype."""
    contents = export.manifest
    if contents.saves in manifest.SAVES:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = str(dtypes.dtype_for(export.recipe.model, device)).removeprefix("torch.")
        return f"torch in {contents.quantization['kind'] if contents.quantization else dtype}"
    return f"{EXPORTERS.get(contents.saves)().usage(contents).library} in {contents.dtype}"
