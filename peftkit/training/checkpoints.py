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

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"step-(\d{8,})")
STAGING, TRASH = ".staging-", ".trash-"
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """The JSON state."""
        return dict(json.loads((self.path / STATE).read_text()))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of ``model.safetensors`` or ``optimizer.safetensors``, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / name)


def save(
    root: Path, step: int, *, model: Mapping[str, Any], optimizer: Mapping[str, Any], state: Mapping[str, Any]
) -> Checkpoint:
    """Writes a checkpoint atomically.

    Raises:
        CheckpointError: it could not be written (disk full, read-only); what was staged is removed, and the
            checkpoints that stood before are untouched.
    """
    from safetensors.torch import save_file

    final = root / f"step-{step:08d}"
    staging = root / f"{STAGING}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save_file(_plain(model), staging / MODEL)
        save_file(_plain(optimizer), staging / OPTIMIZER)
        (staging / STATE).write_text(json.dumps(state, indent=1))
        files = {name: _digest(staging / name) for name in (MODEL, OPTIMIZER, STATE)}
        (staging / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
        for name in (*files, MANIFEST):
            _fsync(staging / name)
        _fsync(staging)
        _discard(final)  # only a checkpoint of the same step can stand there: one that a resumed run repeats
        os.replace(staging, final)
        _fsync(root)
    except (OSError, RuntimeError) as error:  # safetensors reports I/O errors as RuntimeError
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {step} could not be written to {root}: {error}") from None
    return Checkpoint(final, step)


def verify(path: Path) -> str | None:
    """Why a folder is not a valid checkpoint; None when it is one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"its manifest cannot be read ({error})"
    match = NAME.fullmatch(path.name)
    if match is None or int(match[1]) != step:
        return f"its manifest is that of step {step}"
    if set(files) != {MODEL, OPTIMIZER, STATE}:
        return "its manifest does not list the right files"
    for name, (size, digest) in files.items():
        found = _digest(path / name) if (path / name).is_file() else None
        if found is None:
            return f"{name} is missing"
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


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and a line about each newer one that had to be passed over."""
    rejected: list[str] = []
    for step, path in candidates(root):
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
    """Removes all but the ``keep`` newest checkpoints and the protected steps, and what a killed run left staged."""
    for index, (step, path) in enumerate(candidates(root)):
        if index >= keep and step not in protect:
            _discard(path)
    sweep(root)


def sweep(root: Path) -> None:
    """Removes staged and half-removed folders; call it only while holding the run's lock."""
    if root.is_dir():
        for path in root.iterdir():
            if path.name.startswith((STAGING, TRASH)):
                shutil.rmtree(path, ignore_errors=True)


def _discard(path: Path) -> None:
    """Removes a checkpoint so that it is never seen half removed."""
    if path.exists():
        trash = path.with_name(TRASH + path.name)
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _plain(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Contiguous CPU copies: safetensors refuses views that share storage."""
    return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)  # some file systems refuse it for folders
    finally:
        os.close(descriptor)
