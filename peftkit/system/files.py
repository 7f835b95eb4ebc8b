"""Files and folders that are complete or absent, and flushed to the disk when the call returns.

New content is staged under a unique hidden name next to its place, flushed, renamed, and the parent folder is flushed:
the protocol of Pillai et al. 2014 ("All file systems are not created equal").
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from peftkit.errors import DataError

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 24  # bytes per call of write
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}
"""Errors of file systems that cannot flush a folder; errors of the device itself are not among them."""
FULL_OR_BROKEN = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ENODEV, errno.ESTALE}
"""Errors of the storage, which the program cannot repair."""
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields the path of a staging file, which replaces ``path`` when the block ends without an exception."""
    staging = staging_path(path)
    try:
        yield staging
        flush_file(staging)
        os.replace(staging, path)
        flush_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[IO[str]]:
    """Yields a text stream whose content replaces ``path`` when the block ends without an exception."""
    with atomic_file(path) as staging, staging.open("x", encoding="utf-8", newline="") as stream:
        yield stream


def write_text(path: Path, text: str) -> None:
    """Replaces a text file, or creates it."""
    with atomic_file(path) as staging:
        write_new(staging, [text.encode()])


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file, or creates it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path, mode: int = 0o777) -> Iterator[Path]:
    """Yields a staging folder, which replaces ``path`` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = staging_path(path)
    try:
        staging.mkdir(mode)
        yield staging
        for child in sorted(staging.rglob("*")):
            (flush_folder if child.is_dir() else flush_file)(child)
        flush_folder(staging)
        swap_folder(staging, path, staging_path(path))
        flush_folder(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def swap_folder(staging: Path, path: Path, aside: Path) -> None:
    """Renames a staged folder to ``path``; one that is already there goes ``aside`` first and is removed last."""
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    try:
        os.replace(staging, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.replace(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def staging_path(path: Path) -> Path:
    """A unique hidden name next to ``path``, ending in ``.tmp``."""
    return path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")


def is_staging(path: Path) -> bool:
    """Whether a path has a name of ``staging_path``, so that it may be incomplete."""
    return re.fullmatch(r"\..*\.[0-9a-f]{8}\.tmp", path.name) is not None


def check_output(out: Path, source: Path | None) -> None:
    """Raises DataError when ``out`` cannot be written or is the input file; call it before any work is done."""
    if not out.resolve().parent.is_dir():
        raise DataError(f"there is no folder {out.resolve().parent}; create it first", file=out)
    if out.is_dir():
        raise DataError("is a folder; name a file with --out", file=out)
    if source and out.exists() and out.samefile(source):
        raise DataError("is the input file and would be overwritten; name another file with --out", file=out)


def write_new(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a new file and flushes it; returns ``bytes`` and ``sha256`` of the intended content, or raises OSError."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            digest.update(piece)
            left = memoryview(piece)
            size += len(left)
            while left:  # a call of write may write less than it was given
                left = left[os.write(descriptor, left[:CHUNK]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def flush_file(path: Path) -> None:
    """Flushes a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Flushes the names in a folder to the disk, where the file system can; a broken device raises OSError."""
    try:
        flush_file(path)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time, so that no second copy of all of them is in memory.

    Format: u64 length of the header, little-endian; the header, JSON padded with spaces to 8 bytes; the tensors' bytes
    in the header's order (https://huggingface.co/docs/safetensors). Larger types come first, which keeps all aligned.
    """
    import torch

    assert sys.byteorder == "little", "safetensors files are little-endian"
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, start = {}, 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield tensors[name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
