"""Files that appear only when they are complete, and never in place of what they are made from."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from peftkit.errors import DataError


def check(out: Path, source: Path | None) -> None:
    """Raises DataError when ``out`` cannot be written, or is the input; called before any work is done."""
    if not out.resolve().parent.is_dir():
        raise DataError(f"there is no folder {out.resolve().parent}; make it first", file=out)
    if out.is_dir():
        raise DataError("is a folder; name a file with --out", file=out)
    if source and out.exists() and out.samefile(source):
        raise DataError("is the input too, and would be overwritten; name another file with --out", file=out)


@contextlib.contextmanager
def complete(out: Path) -> Iterator[IO[str]]:
    """A file beside ``out`` that takes its name when everything is written and safe on the disk."""
    with tempfile.NamedTemporaryFile(
        "w", dir=out.resolve().parent, prefix=f".{out.name}.", encoding="utf-8", newline="", delete=False
    ) as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o666 & ~_umask())
            os.replace(stream.name, out)
        except BaseException:
            os.unlink(stream.name)
            raise


def _umask() -> int:
    held = os.umask(0)
    os.umask(held)
    return held
