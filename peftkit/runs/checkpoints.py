"""Checkpoints, which are complete or absent.

    checkpoints/step-00000120/
        model.safetensors       trained tensors, by name
        optimizer.safetensors   optimizer tensors, by parameter name
        state.json              everything else that training resumes from
        manifest.json           size and SHA-256 of each file; written last

A checkpoint is staged in a hidden folder, flushed, and renamed (``system.files``). A folder without a matching manifest
is not a checkpoint. Nothing in it can run code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import CheckpointError
from peftkit.system import files

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"step-(\d{8,})")
STAGING, TRASH, DAMAGED = ".staging-", ".trash-", "damaged-"
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """The JSON state; raises CheckpointError if it cannot be read."""
        try:
            return dict(json.loads((self.path / STATE).read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self.path / STATE} cannot be read ({error})") from None

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of MODEL or OPTIMIZER, on the CPU; raises CheckpointError if the file cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / name} cannot be read ({error})") from None


def save(
    root: Path, step: int, *, model: Mapping[str, Any], optimizer: Mapping[str, Any], state: Mapping[str, Any]
) -> Checkpoint:
    """Writes a checkpoint atomically; raises CheckpointError, and leaves earlier ones untouched, if that fails."""
    final = root / f"step-{step:08d}"
    staging = root / f"{STAGING}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        written = {
            MODEL: files.write_new(staging / MODEL, files.safetensors(model)),
            OPTIMIZER: files.write_new(staging / OPTIMIZER, files.safetensors(optimizer)),
            STATE: files.write_new(staging / STATE, [json.dumps(state, indent=1).encode()]),
        }
        manifest = {"step": step, "files": written}
        files.write_new(staging / MANIFEST, [json.dumps(manifest, indent=1).encode()])
        files.flush_folder(staging)
        files.swap_folder(staging, final, final.with_name(TRASH + final.name))  # resumed runs repeat steps
        files.flush_folder(root)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        _restore_replaced(root)
        raise CheckpointError(
            f"checkpoint of step {step} could not be written to {root}: {error.strerror or error}"
        ) from None
    return Checkpoint(final, step)


def verify(path: Path, name: str | None = None) -> str | None:
    """Why a folder is not a valid checkpoint of ``name`` (its own by default); None if it is one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        listed = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        return f"its manifest cannot be read ({error})"
    match = NAME.fullmatch(name or path.name)
    if match is None or int(match[1]) != step:
        return f"its manifest belongs to step {step}"
    if set(listed) != {MODEL, OPTIMIZER, STATE}:
        return "its manifest does not list the right files"
    for name, (size, digest) in listed.items():
        try:
            if (actual := (path / name).stat().st_size) != size:
                return f"{name} has {actual} bytes, not {size}"
            if files.file_digest(path / name) != digest:
                return f"{name} does not have the SHA-256 in the manifest"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def candidates(root: Path) -> Iterator[tuple[int, Path]]:
    """Yields (step, folder) of everything named like a checkpoint, newest first."""
    paths = root.iterdir() if root.is_dir() else ()
    yield from sorted(((int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name))), reverse=True)


def newest(root: Path, before: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, of a step before ``before``, and a note about each newer one that was rejected."""
    rejected: list[str] = []
    for step, path in candidates(root):
        if before is None or step < before:
            if (reason := verify(path)) is None:
                return Checkpoint(path, step), rejected
            rejected.append(f"{path} is not used: {reason}")
    return None, rejected


def at_step(root: Path, step: int) -> Checkpoint:
    """The valid checkpoint of a step; raises CheckpointError with the reason if there is none."""
    path = root / f"step-{step:08d}"
    if reason := verify(path):
        raise CheckpointError(f"{path} cannot be used: {reason}")
    return Checkpoint(path, step)


def prune(root: Path, *, keep: int, protect: set[int | None]) -> None:
    """Removes all but the ``keep`` newest checkpoints and the protected steps, and what a killed run left staged."""
    with contextlib.suppress(OSError):  # what cannot be removed is left for the next time
        for index, (step, path) in enumerate(candidates(root)):
            if index >= keep and step not in protect:
                _discard(path)
        remove_staged(root)


def remove_staged(root: Path) -> None:
    """Removes staged and half-removed folders and restores a replaced checkpoint; requires the run's lock."""
    _restore_replaced(root)
    for kind in (STAGING, TRASH):
        for path in list(root.glob(f"{kind}*")):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(root: Path, chosen: Checkpoint | None) -> None:
    """Renames everything newer than the chosen checkpoint to ``damaged-…``: kept for inspection, but never used."""
    for step, path in candidates(root):
        if chosen and step <= chosen.step:
            return
        with contextlib.suppress(OSError):
            target = path.with_name(DAMAGED + path.name)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(path, target)


def _restore_replaced(root: Path) -> None:
    """Moves back what an interrupted save had moved away, unless a checkpoint has taken its place."""
    for path in list(root.glob(f"{TRASH}*")):
        original = path.with_name(path.name.removeprefix(TRASH))
        if not original.exists() and verify(path, original.name) is None:
            with contextlib.suppress(OSError):
                os.replace(path, original)


def _discard(path: Path) -> None:
    """Removes a checkpoint, its manifest first, so that it is never taken for a valid one when half removed."""
    (path / MANIFEST).unlink(missing_ok=True)
    trash = path.with_name(TRASH + path.name)
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(path, trash)
    shutil.rmtree(trash, ignore_errors=True)
