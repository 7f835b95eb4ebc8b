"""A run's exports for runtimes other than torch: where they are, and whether they still are the run.

RUN/  adapter/  onnx/  onnx-int8/        each under the name of its format
"""

from __future__ import annotations

from pathlib import Path

from peftkit.errors import PeftkitError
from peftkit.export import proof
from peftkit.export.folder import ExportFolder, open_export, weights_digest


def home(export: ExportFolder) -> Path:
    """The folder that holds a run's exports: the run's, or an exported folder's own."""
    return export.path.parent if export.path.name == export.manifest.saves else export.path


def command(export: ExportFolder, name: str) -> str:
    """The command that writes a run's export of a format where it is looked for."""
    return f"peftkit export {home(export)} --to {home(export) / name} --format {name}"


def proven(export: ExportFolder, name: str) -> tuple[ExportFolder | None, str]:
    """A run's export of a format, or None and what is wrong with it: no proof, or other weights than the run's."""
    try:
        opened = open_export(home(export) / name)
    except PeftkitError as error:
        return None, f"cannot be read ({error})"
    if not (proof.read(opened.path) or {}).get("passed"):
        return None, "has no proof that passed"
    if opened.manifest.origin != weights_digest(export.path):
        return None, "was not written from this run's weights"
    return opened, ""
