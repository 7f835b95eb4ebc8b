"""Text files as text: their encoding and line ends are detected, and every byte that does not fit is named by its line.

A file is UTF-8 if all of it is; UTF-16 and UTF-32 begin with a byte-order mark; a file without any valid UTF-8
character is cp1252 if it reads as Western European text. Everything else needs ``data.encoding``.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from peftkit.data.archives import open_binary
from peftkit.data.problems import Problems, shorten
from peftkit.errors import DataError

CHUNK = 1 << 20
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""Byte-order mark → encoding; UTF-32's little-endian mark begins with UTF-16's."""
BROKEN = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as ``surrogateescape`` decodes them."""
LETTERS = "àáâãäåæçèéêëìíîïñòóôõöøùúûüÿœßÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜŒ"
SIGNS = "\xa0€‚ƒ„…†‡‰‹‘’“”•–—™›¡¢£§©ª«®°±²³´µ¶·¹º»¼½¾¿×÷¨"
FOREIGN = re.compile(
    f"[^\0-\x7f{LETTERS}{SIGNS}]"  # letters of other scripts, controls, and bytes that cp1252 lacks
    f"|(?<=[a-zà-öø-ÿ])[À-ÖØ-ÞŒ]"  # a capital after a small letter: Mac Roman, DOS code pages
    f"|(?<=[A-Za-zÀ-ÿ])[¡¢£§©«°±²³´µ¶·¹º¼½¾¿×÷¨‚ƒ„†‡‰‹•“”](?=[A-Za-zÀ-ÿ])"  # a sign inside a word
    f"|[{LETTERS}]{{3}}"  # a word of other letters
)
"""What Western European texts in cp1252 do not hold."""
MOST_ACCENTS, FEW_ACCENTS = 0.25, 4
"""Share of the letters, and number of them, that may be accented in a text that is taken for cp1252."""


@dataclass(frozen=True)
class TextFormat:
    """How the bytes of a file are text."""

    encoding: str
    """Python's name of the codec; a byte-order mark is not part of the text."""
    line_end: str = "\n"
    """What ends a line: ``\\n``, which also closes ``\\r\\n``, or ``\\r``."""

    def remarks(self) -> list[str]:
        """What is not as in a plain file, in words."""
        encoding = [] if self.encoding == "utf-8" else [self.encoding]
        return encoding + (["lines that end in a carriage return"] if self.line_end == "\r" else [])


class Lines:
    """Lines of a file as text, counted; a line with bad bytes is added to ``problems`` and sets ``spoiled``.

    ``errors`` is what is done about bad bytes, as for ``bytes.decode``.
    """

    def __init__(self, path: Path, problems: Problems, form: TextFormat, errors: str = "strict") -> None:
        self.number, self.spoiled, self.form = 0, False, form
        self._path, self._problems, self._errors = path, problems, errors

    def __iter__(self) -> Iterator[str]:
        with open_binary(self._path) as stream:
            yield from self._lines(stream) if _is_ascii_superset(self.form.encoding) else self._decoded_lines(stream)

    def _lines(self, stream: BinaryIO) -> Iterator[str]:
        encoding = self.form.encoding
        for line in _split_lines(stream, self.form.line_end.encode()):
            self.number += 1
            if self.number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode(encoding, errors=self._errors)
            except UnicodeDecodeError as error:
                self.spoiled = True
                self._problems.add(_bad_byte(line, error, encoding, self._path, self.number))
                text = line.decode(encoding, errors="replace")
            yield text

    def _decoded_lines(self, stream: BinaryIO) -> Iterator[str]:
        """Lines in an encoding whose line ends are no single bytes."""
        reader = io.TextIOWrapper(stream, self.form.encoding, self._errors, newline=self.form.line_end)
        try:
            for line in reader:
                self.number += 1
                yield line.removeprefix("\ufeff") if self.number == 1 else line
        except UnicodeError as error:
            message = f"not valid {self.form.encoding} from here on ({_reason(error)}); set data.encoding"
            raise self._problems.fatal(DataError(message, file=self._path, line=self.number + 1)) from None
        finally:
            reader.detach()  # the stream is closed by who opened it; a sample ends before the file does


def first_lines(path: Path, form: TextFormat, characters: int) -> tuple[list[str], bool]:
    """The first lines, up to about as many characters, and whether they are the whole file."""
    lines: list[str] = []
    size = 0
    for line in Lines(path, Problems(), form, "replace"):
        if size >= characters:
            return lines, False
        lines.append(line)
        size += len(line)
    return lines, True


def decode_file(
    path: Path, problems: Problems, encoding: str | None = None, fallback: str | None = None
) -> tuple[str, TextFormat]:
    """A file's text with newlines for line ends, and its format; ``fallback`` is the encoding of what is not UTF-8."""
    with open_binary(path) as stream:
        content = stream.read()
    if fallback is not None:
        try:
            text, form = content.decode("utf-8"), TextFormat("utf-8")
        except UnicodeDecodeError:
            text, form = content.decode(fallback, errors="replace"), TextFormat(fallback)
    else:
        form = detect(path, encoding)
        try:
            text = content.decode(form.encoding)
        except UnicodeDecodeError as error:
            number = content.count(b"\n", 0, error.start) + 1
            raise problems.fatal(_bad_byte(content, error, form.encoding, path, number)) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    return (text.replace("\r", "\n") if form.line_end == "\r" else text), form


def detect(path: Path, encoding: str | None = None) -> TextFormat:
    """The format of a file, all of which is read; ``encoding`` is that of a file that is not UTF-8.

    Raises DataError for what looks like UTF-16 but does not say so. A file that is nothing known is UTF-8 here: reading
    it names its bad bytes.
    """
    with open_binary(path) as stream:
        start = stream.read(4)
    marked = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
    accents, broken = _count_accents(path) if marked == "utf-8" else (0, 0)
    name = marked
    if marked == "utf-8" and encoding is not None and (broken or not accents):
        name = codecs.lookup(encoding).name
    elif broken and not accents and _is_western(path):
        name = "cp1252"
    elif marked == "utf-8" and not broken:
        _refuse_nulls(path)
    return TextFormat(name, _line_end(_decoded(path, name, "replace")))


def _count_accents(path: Path) -> tuple[int, int]:
    """Characters of several bytes, and bytes that are not UTF-8."""
    accents = broken = 0
    for text in _decoded(path, "utf-8", "surrogateescape"):
        if not text.isascii():
            bad = len(BROKEN.findall(text))
            broken += bad
            accents += len(text) - len(text.encode("ascii", "ignore")) - bad
    return accents, broken


def _is_western(path: Path) -> bool:
    """Whether the file reads as Western European text in cp1252."""
    accented = letters = 0
    for text in _decoded(path, "cp1252", "replace"):
        if FOREIGN.search(text):
            return False
        letters += sum(map(str.isalpha, text))
        accented += sum(character > "\x7f" for character in text if character.isalpha())
    return accented <= MOST_ACCENTS * letters + FEW_ACCENTS


def _refuse_nulls(path: Path) -> None:
    """Raises DataError for UTF-16 or UTF-32 without a byte-order mark, which is valid UTF-8 full of NULs."""
    with open_binary(path) as stream:
        start = stream.read(4096)
    if start.count(0) > len(start) / 4:
        guess = "utf-16-be" if start[:1] == b"\0" else "utf-16-le"
        raise DataError(f"the file holds NUL bytes, as UTF-16 does; set data.encoding={guess}", file=path, line=1)


def _decoded(path: Path, encoding: str, errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    with open_binary(path) as stream:
        while chunk := stream.read(CHUNK):
            yield decoder.decode(chunk)
        yield decoder.decode(b"", True)


def _line_end(chunks: Iterator[str]) -> str:
    carriage_return = False
    for text in chunks:
        if "\n" in text:
            return "\n"
        carriage_return |= "\r" in text
    return "\r" if carriage_return else "\n"


def _split_lines(stream: BinaryIO, end: bytes) -> Iterator[bytes]:
    if end == b"\n":
        yield from stream
        return
    rest = b""
    while chunk := stream.read(CHUNK):
        *lines, rest = (rest + chunk).split(end)
        yield from (line + end for line in lines)
    if rest:
        yield rest


def _is_ascii_superset(encoding: str) -> bool:
    """Whether line ends are the single bytes of ASCII, wherever they occur."""
    return "a\r\n".encode(encoding) == b"a\r\n"


def _bad_byte(content: bytes, error: UnicodeDecodeError, encoding: str, path: Path, number: int) -> DataError:
    around = content[max(0, error.start - 12) : error.start + 12].decode("cp1252", errors="replace").strip()
    name = "UTF-8" if encoding == "utf-8" else encoding
    message = f"byte 0x{content[error.start]:02x} is not {name} (near {shorten(around, 40)})"
    hint = "save the file as UTF-8, or set data.encoding to what it is (cp1252, cp1250, cp1251, gbk, shift_jis, …)"
    return DataError(f"{message}; {hint}", file=path, line=number)


def _reason(error: UnicodeError) -> str:
    return getattr(error, "reason", "") or str(error)
