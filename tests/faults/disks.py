"""Disks that are really full or read-only: small file systems in memory, where this process may mount them."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


@functools.cache
def mountable() -> bool:
    """Whether this process may mount file systems."""
    with tempfile.TemporaryDirectory() as name:
        if _said_no("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", name):
            return False
        return not _said_no("umount", name)


@contextlib.contextmanager
def disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """An empty disk of that size at ``folder``; what was on it is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    _must("mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _must("umount", "--lazy", str(folder))


def resize(folder: Path, kibibytes: int) -> None:
    """Gives a disk another size; what is on it stays."""
    _must("mount", "-o", f"remount,size={kibibytes}k", str(folder))


def read_only(folder: Path, *, on: bool = True) -> None:
    """Makes a disk read-only, or writable again."""
    _must("mount", "-o", f"remount,{'ro' if on else 'rw'}", str(folder))


def used(folder: Path) -> int:
    """Kibibytes that the files under a folder take, every one rounded up to pages of 4 KiB."""
    return sum(4 * -(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())


def _must(*command: str) -> None:
    said = _said_no(*command)
    assert not said, said


def _said_no(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return f"{' '.join(command)}: {done.stderr or done.returncode}" if done.returncode else ""
