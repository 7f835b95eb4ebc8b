"""Files as bytes: plain ones, compressed ones, and zip archives of one file, unpacked while they are read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from peftkit.errors import DataError

COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Ending of a compressed file → how it is opened."""
ARCHIVES = (*COMPRESSED, ".zip")
OTHER_ARCHIVES = (".zst", ".7z", ".rar", ".tar", ".tgz")
DAMAGED = (EOFError, OSError, RuntimeError, NotImplementedError, lzma.LZMAError, zipfile.BadZipFile, zlib.error)
"""What unpacking raises; RuntimeError is that of a zip that asks for a password."""


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked; raises DataError where an archive is damaged, when opened or while it is read."""
    kind = path.suffix.lower()
    if kind not in ARCHIVES:
        with path.open("rb") as stream:
            yield stream
        return
    try:
        if kind == ".zip":
            with zipfile.ZipFile(path) as archive, archive.open(_member(archive, path)) as member:
                yield cast(BinaryIO, member)
        else:
            with COMPRESSED[kind](path, "rb") as stream:
                yield stream
    except DataError:
        raise
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot be unpacked ({reason}); copy it again, or unpack it yourself", file=path) from None


def inner_ending(path: Path) -> str:
    """The ending of the file inside, in lower case; where that has none, its first character gives one."""
    name = Path(path.stem)
    if path.suffix.lower() == ".zip" and path.is_file():
        with open_binary(path) as stream:
            name = Path(stream.name)
    if name.suffix or not path.is_file():
        return name.suffix.lower()
    with open_binary(path) as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return ".json" if start[:1] in (b"{", b"[") else ".csv"


def _member(archive: zipfile.ZipFile, path: Path) -> str:
    """The only file of an archive, but for folders and hidden files."""
    names = [name for name in archive.namelist() if not name.endswith("/") and not _hidden(name)]
    if len(names) == 1:
        return names[0]
    inside = f"{len(names)} files ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})" if names else "no file"
    raise DataError(f"expected an archive of one file, found {inside}; unpack it and name the folder", file=path)


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
