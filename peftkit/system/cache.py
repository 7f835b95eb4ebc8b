"""Where peftkit keeps what it can compute again: ``$PEFTKIT_CACHE`` or ``~/.cache/peftkit``. Safe to delete any time.

An entry is a folder that appears complete or not at all, sealed with a manifest of sizes and SHA-256. A reader treats
an entry whose manifest is missing or does not match as absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock

from peftkit.system.files import atomic_folder, file_digest

MANIFEST, ARRAY = "manifest.json", "array.npy"


def cache_folder(kind: str) -> Path:
    """The folder of one kind of entry ("encoded", "features", …), created when missing."""
    root = Path(os.environ.get("PEFTKIT_CACHE") or Path.home() / ".cache" / "peftkit").expanduser()
    (root / kind).mkdir(parents=True, exist_ok=True)
    return root / kind


@contextmanager
def new_entry(path: Path) -> Iterator[Path]:
    """Yields a staging folder that is sealed and replaces ``path`` when the block ends without an exception."""
    with atomic_folder(path, mode=0o700) as staging:
        yield staging
        seal(staging)


@contextmanager
def entry_lock(path: Path) -> Iterator[None]:
    """Lock of the entry at ``path``: one process computes it, the others wait and then read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name[:80]}.lock"):
        yield


@contextmanager
def cached_entry(path: Path, write: Callable[[Path], None]) -> Iterator[None]:
    """Holds the lock of the entry at ``path``, which ``write`` fills first where there is no intact one."""
    with entry_lock(path):
        if not is_intact(path):
            with new_entry(path) as folder:
                write(folder)
        yield


def cached_array(kind: str, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array stored under this key, computed and stored first where there is none."""
    path = cache_folder(kind) / key
    with cached_entry(path, lambda folder: np.save(folder / ARRAY, compute(), allow_pickle=False)):
        array: np.ndarray = np.load(path / ARRAY, allow_pickle=False)
        return array


def seal(folder: Path) -> None:
    """Writes the manifest of all files under ``folder``."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")


def is_intact(folder: Path, *, hashed: bool = True) -> bool:
    """Whether the entry exists, and all files have the sizes and, if ``hashed``, SHA-256 of its manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(files, dict) and all(
            (folder / name).stat().st_size == entry["size"]
            and (not hashed or file_digest(folder / name) == entry["sha256"])
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
