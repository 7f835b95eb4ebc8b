"""Checkpoints that exist whole or not at all.

    checkpoints/step-00000120/
        model.safetensors       trained tensors, by name
        optimizer.safetensors   optimizer tensors, by parameter name
        state.json              everything else that must continue
        manifest.json           size and SHA-256 of each file; written last

A checkpoint is staged in a hidden folder, every file is fsynced, the manifest is written, the folder is renamed and its
parent fsynced: the protocol of Pillai et al. 2014 ("All file systems are not created equal"). A folder without a
manifest that matches does not count as a checkpoint. Nothing in it can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
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
        """The JSON state; raises CheckpointError when it cannot be read."""
        try:
            return dict(json.loads((self.path / STATE).read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self.path / STATE} cannot be read ({error})") from None

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of ``model.safetensors`` or ``optimizer.safetensors``, on the CPU.

        Raises:
            CheckpointError: the file cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / name} cannot be read ({error})") from None


def save(
    root: Path, step: int, *, model: Mapping[str, Any], optimizer: Mapping[str, Any], state: Mapping[str, Any]
) -> Checkpoint:
    """Writes a checkpoint atomically.

    Raises:
        CheckpointError: it could not be written (disk full, read-only); what was staged is removed, and the
            checkpoints that stood before are untouched.
    """
    final = root / f"step-{step:08d}"
    staging = root / f"{STAGING}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        written = {
            MODEL: files.write(staging / MODEL, files.safetensors(model)),
            OPTIMIZER: files.write(staging / OPTIMIZER, files.safetensors(optimizer)),
            STATE: files.write_json(staging / STATE, state),
        }
        files.write_json(staging / MANIFEST, {"step": step, "files": written})
        files.flush_folder(staging)
        _replace(staging, final)
        files.flush_folder(root)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        recover(root)
        raise CheckpointError(
            f"checkpoint of step {step} could not be written to {root}: {error.strerror or error}"
        ) from None
    return Checkpoint(final, step)


def verify(path: Path, name: str | None = None) -> str | None:
    """Why a folder is not a valid checkpoint; None when it is one (of the name given, if not its own)."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        return f"its manifest cannot be read ({error})"
    match = NAME.fullmatch(name or path.name)
    if match is None or int(match[1]) != step:
        return f"its manifest is that of step {step}"
    if set(files) != {MODEL, OPTIMIZER, STATE}:
        return "its manifest does not list the right files"
    for name, (size, digest) in files.items():
        try:
            found = _digest(path / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found["bytes"] != size:
            return f"{name} has {found['bytes']} bytes, not {size}"
        if found["sha256"] != digest:
            return f"{name} does not have the SHA-256 of its manifest"
    return None


def candidates(root: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of what is named like a checkpoint, newest first."""
    if root.is_dir():
        found = [(int(match[1]), path) for path in root.iterdir() if (match := NAME.fullmatch(path.name))]
        yield from sorted(found, reverse=True)


def newest(root: Path, before: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, ``before`` a step, and a line about each newer one that had to be passed over."""
    rejected: list[str] = []
    for step, path in candidates(root):
        if before is not None and step >= before:
            continue
        reason = verify(path)
        if reason is None:
            return Checkpoint(path, step), rejected
        rejected.append(f"{path} is not used: {reason}")
    return None, rejected


def at_step(root: Path, step: int) -> Checkpoint:
    """The valid checkpoint of a step; raises CheckpointError with the reason when there is none."""
    path = root / f"step-{step:08d}"
    reason = verify(path)
    if reason:
        raise CheckpointError(f"{path} cannot be used: {reason}")
    return Checkpoint(path, step)


def prune(root: Path, *, keep: int, protect: set[int]) -> None:
    """Removes all but the ``keep`` newest checkpoints and the protected steps, and what a killed run left staged.

    What cannot be removed is left for the next time: the checkpoint just written counts more than tidiness.
    """
    with contextlib.suppress(OSError):
        for index, (step, path) in enumerate(candidates(root)):
            if index >= keep and step not in protect:
                _discard(path)
        sweep(root)


def sweep(root: Path) -> None:
    """Removes staged and half-removed folders, and puts back a checkpoint that was just being replaced.

    Call it only while holding the run's lock.
    """
    recover(root)
    if root.is_dir():
        for path in root.iterdir():
            if path.name.startswith((STAGING, TRASH)):
                shutil.rmtree(path, ignore_errors=True)


def set_aside(root: Path, chosen: Checkpoint | None) -> None:
    """Renames all that is newer than the checkpoint gone on with: kept for a look, counted by nobody."""
    for step, path in candidates(root):
        if chosen and step <= chosen.step:
            return
        with contextlib.suppress(OSError):
            place = path.with_name(DAMAGED + path.name)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(path, place)


def recover(root: Path) -> None:
    """Puts back what ``_replace`` had moved away when it was cut off, unless its place is taken."""
    if not root.is_dir():
        return
    for path in list(root.glob(f"{TRASH}*")):
        place = path.with_name(path.name.removeprefix(TRASH))
        if not place.exists() and verify(path, place.name) is None:
            with contextlib.suppress(OSError):
                os.replace(path, place)


def _replace(staging: Path, final: Path) -> None:
    """Puts the new folder where perhaps an old one of the same step stands: one that a resumed run repeats.

    The old one is moved aside and not removed before the new one is in place, so that one of them always is there.
    """
    old = final.with_name(TRASH + final.name)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(staging, final)
    shutil.rmtree(old, ignore_errors=True)


def _discard(path: Path) -> None:
    """Removes a checkpoint so that it is never seen half removed: its manifest goes first."""
    (path / MANIFEST).unlink(missing_ok=True)
    trash = path.with_name(TRASH + path.name)
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
