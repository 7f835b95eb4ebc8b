"""UTF-8 files as text, with the line of every byte that is not UTF-8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from peftkit.data.problems import Problems, shorten
from peftkit.errors import DataError


class Lines:
    """Lines of a stream as text, counted; a line that is not UTF-8 is added to ``problems`` and sets ``spoiled``."""

    def __init__(self, stream: BinaryIO, path: Path, problems: Problems, errors: str = "strict") -> None:
        self.number, self.spoiled, self._errors = 0, False, errors
        self._stream, self._path, self._problems = stream, path, problems

    def __iter__(self) -> Iterator[str]:
        for line in self._stream:
            self.number += 1
            if self.number == 1:
                line = _without_mark(line, self._path)
            try:
                text = line.decode("utf-8", errors=self._errors)
            except UnicodeDecodeError as error:
                self.spoiled = True
                self._problems.add(_not_utf8(line, error, self._path, self.number))
                text = line.decode("utf-8", errors="replace")
            yield text


def decode_file(path: Path, problems: Problems, fallback: str | None = None) -> str:
    """A file's text with newlines for line ends; ``fallback`` is the encoding of files that are not UTF-8."""
    content = _without_mark(path.read_bytes(), path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        if fallback is None:
            number = content.count(b"\n", 0, error.start) + 1
            raise problems.fatal(_not_utf8(content, error, path, number)) from None
        text = content.decode(fallback, errors="replace")
    return text.replace("\r\n", "\n")


def _without_mark(start: bytes, path: Path) -> bytes:
    """The first bytes of a file without UTF-8's byte-order mark; raises DataError for UTF-16 and UTF-32."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is UTF-16, expected UTF-8; save it as UTF-8", file=path, line=1)
    return start.removeprefix(b"\xef\xbb\xbf")


def _not_utf8(line: bytes, error: UnicodeDecodeError, path: Path, number: int) -> DataError:
    around = line[max(0, error.start - 12) : error.start + 12].decode("cp1252", errors="replace").strip()
    detected = f"byte 0x{line[error.start]:02x} is not UTF-8 (near {shorten(around, 40)})"
    return DataError(f"{detected}; save the file as UTF-8", file=path, line=number)
