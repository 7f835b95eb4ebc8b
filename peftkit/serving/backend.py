"""Which form of a run is served: the run itself, or an export in its folder that answers faster on this machine.

An export is used if its proof passed and it was written from the run's weights (``export.runtimes``). So `peftkit
export RUN --to RUN/onnx --format onnx` once makes `peftkit serve RUN` faster. There are no texts as yet on which
runtimes could be measured, as `predict` measures them: their usual speeds decide (``Exporter.speed``), or the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from peftkit.errors import RunError
from peftkit.export import manifest, proof, runtimes
from peftkit.export.folder import ExportFolder, open_export
from peftkit.inference.backends import AUTO, TORCH, open_backend
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


def choose(run: Path, *, wanted: str | None = None, needs: Sequence[str] = ()) -> Backend:
    """The form of a run that a backend computes, by default the fastest proven one.

    Args:
        wanted: ``auto``, ``torch``, or the format of an export in the run's folder; as ``predict`` takes it.
        needs: options that only the run itself can serve.

    Raises:
        RunError: not a finished run; an unknown backend, or no proven export for it; one that cannot serve ``needs``.
    """
    own = open_export(run)
    if wanted not in (None, AUTO, TORCH):
        return _named(own, wanted, needs)
    open_backend(own, wanted)
    itself = " and ".join([f"--backend {TORCH}"] * (wanted == TORCH) + [*needs])
    plain = Backend(own, f"{_library(own)} (the run itself{': ' if itself else ''}{itself})")
    if itself or own.manifest.saves not in manifest.SAVES:
        return plain
    if torch.cuda.is_available():
        return replace(plain, reason=f"{_library(own)} (the run itself: exports for CPUs are not used with a GPU)")
    return _fastest(own, plain)


def _named(own: ExportFolder, wanted: str, needs: Sequence[str]) -> Backend:
    """The backend that the user asked for."""
    export = open_backend(own, wanted)
    if needs and export is not own:
        options = " and ".join(needs)
        raise RunError(f"--backend {wanted} serves an export, which cannot serve {options}; leave one of them out")
    return Backend(export, f"{_library(export)} ({export.path}: --backend {wanted})")


def _fastest(own: ExportFolder, plain: Backend) -> Backend:
    """The run itself (``plain``) or the export that is usually faster."""
    best, best_speed = plain, 1.0
    unused: list[str] = []
    for name in runtime_formats():
        folder, exporter = runtimes.home(own) / name, EXPORTERS.get(name)
        if not folder.is_dir():
            continue
        export, problem = runtimes.proven(own, name)
        if exporter.rounds and name not in own.recipe.export.backends:
            export, problem = None, f"rounds, which --backend {name} or `export.backends` of the recipe allows"
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
