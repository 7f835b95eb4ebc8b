"""Files that are on the disk when the call returns: every byte written, flushed and counted by SHA-256.

All goes through ``os``, one call at a time, so that a test can make any single one of them fail.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 24
"""Bytes in one call of write."""
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}
"""What file systems that cannot flush a folder answer; an error of the device itself is not among them."""
FULL_OR_BROKEN = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ENODEV, errno.ESTALE}
"""Errors of the storage, for which the program can do nothing."""
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def write(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a new file and flushes it to the disk; gives bytes and SHA-256 of what was meant.

    Raises:
        OSError: the file exists, or could not be written whole.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            digest.update(piece)
            size += _write_whole(descriptor, memoryview(piece))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write_whole(descriptor: int, view: memoryview) -> int:
    """A call of write may take less than it was given."""
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done : done + CHUNK])
    return done


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Writes a new JSON file as ``write`` does."""
    return write(path, [json.dumps(value, indent=1).encode()])


def flush_folder(path: Path) -> None:
    """Makes names in a folder last; a file system that cannot is left alone, a broken device raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a tensor at a time, so that no second copy of all of them is held.

    Format: u64 length of the header, little-endian; the header, JSON padded with spaces to 8 bytes; the tensors' bytes
    in the header's order (https://huggingface.co/docs/safetensors). Larger types come first, which keeps all aligned.
    """
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
        yield _bytes(tensors[name])


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    assert sys.byteorder == "little", "safetensors holds little-endian numbers"
    plain = tensor.detach().to("cpu").contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
