"""A finished run's export copied, or merged, to a folder of the user's choice."""

from __future__ import annotations

import shutil
from pathlib import Path

from peftkit.errors import MethodError, RunError
from peftkit.export import manifest, proof
from peftkit.export.in_memory import Merge
from peftkit.export.loading import find_export, refuse_pickles
from peftkit.export.merge import merge as merge_adapter
from peftkit.schema.recipe import Recipe
from peftkit.system.files import atomic_folder


def deliver(run: Path, to: Path, *, merge: bool, to_format: str = "peft") -> str:
    """See ``peftkit.export.run_export``."""
    folder = find_export(run)
    about = manifest.read(folder)
    refuse_pickles(folder)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to} exists and is not an empty folder; name one that does not exist yet")
    if to_format != "peft":
        from peftkit.export.onnx import export_onnx

        recipe = Recipe.from_yaml(folder / "recipe.yaml")
        if merge and about.saves == "model":
            raise MethodError(f"method '{about.method}' trained the base itself: nothing to merge; leave --merge out")
        if merge and (reason := recipe.method.unmergeable_reason()):
            raise MethodError(f"{reason}; leave --merge out")
        wanted: Merge = True if merge else "auto"
        export_onnx(folder, to, tolerance=recipe.export.tolerance, merge=wanted, int8=to_format == "onnx-int8")
        return f"wrote the ONNX model to {to}{_proven(to)}"
    if not merge:
        with atomic_folder(to) as stage:
            shutil.copytree(folder, stage, dirs_exist_ok=True)
        return f"wrote the {about.saves} to {to}{_proven(to)}"
    if about.saves == "model":
        raise MethodError(
            f"method '{about.method}' trained the base itself, so there is nothing to merge; leave --merge out"
        )
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    if reason := recipe.method.unmergeable_reason():
        raise MethodError(f"{reason}; leave --merge out")
    merge_adapter(folder, to, tolerance=recipe.export.tolerance)
    return f"wrote the merged model to {to}{_proven(to)}"


def _proven(folder: Path) -> str:
    found = proof.read(folder)
    if found is None:
        return "; nothing was proven (export.prove=false)"
    onnx = manifest.read(folder).saves == "onnx"
    read_by = "read by ONNX Runtime" if onnx else "reloaded in a fresh process"
    return (
        f"; {read_by} its logits differ from the trained model's by {found['relative']:.1g} of their spread "
        f"({found['tolerance']:g} allowed)"
    )
