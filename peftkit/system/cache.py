"""Where peftkit keeps what it can make again: ``$PEFTKIT_CACHE`` or ``~/.cache/peftkit``. Safe to delete at any time.

An entry is a folder that appears whole or not at all: it is staged beside its place, sealed with a manifest of sizes
and SHA-256, and renamed. A reader that finds an entry without a manifest that fits treats it as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock

MANIFEST, ARRAY = "manifest.json", "array.npy"
_CHUNK = 1 << 20


def cache_root() -> Path:
    """The cache's folder, which may not exist yet."""
    return Path(os.environ.get("PEFTKIT_CACHE") or Path.home() / ".cache" / "peftkit").expanduser()


def cache_folder(kind: str) -> Path:
    """The folder of one kind of entry ("encoded", "features", …), created when missing."""
    folder = cache_root() / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a staging folder that becomes ``path`` when the block ends without an exception.

    A folder already at ``path`` is replaced. On an exception the staging folder is removed and ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}-", dir=path.parent))
    try:
        yield staging
        seal(staging)
        _swap(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def entry_lock(path: Path) -> Iterator[None]:
    """Held by the one process that makes the entry at ``path``; the others wait and then find it made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name[:80]}.lock"):
        yield


def cached_array(kind: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that was made before under this key, or that ``make`` gives now and is kept."""
    path = cache_folder(kind) / key
    with entry_lock(path):
        if not is_intact(path):
            made = make()
            with atomic_folder(path) as folder:
                np.save(folder / ARRAY, made, allow_pickle=False)
        found: np.ndarray = np.load(path / ARRAY, allow_pickle=False)
        return found


def seal(folder: Path) -> None:
    """Writes the manifest of all files under ``folder`` and flushes them to the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            _flush(path)
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": file_digest(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(files, indent=1), encoding="utf-8")
    _flush(manifest)


def is_intact(folder: Path) -> bool:
    """Whether the entry exists, and every file in its manifest has the size and SHA-256 written there."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(files, dict) and all(
            (folder / name).stat().st_size == held["size"] and file_digest(folder / name) == held["sha256"]
            for name, held in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _swap(staging: Path, path: Path) -> None:
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}-old-", dir=path.parent))
        path.rename(old / "entry")
        staging.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        staging.rename(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
