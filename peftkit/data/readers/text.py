"""Text files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peftkit.data.decoding import decode_file
from peftkit.data.problems import Problems
from peftkit.data.reader import DocumentReader
from peftkit.schema.registries import READERS
from peftkit.schema.types import Row


@READERS.register("txt")
@dataclass(frozen=True)
class TextReader(DocumentReader):
    """Text files, a document each; for predictions, a row per line."""

    extensions = (".txt",)

    fallback: str | None = None
    """Encoding of files that are not UTF-8; None makes them an error."""

    def text(self, path: Path, problems: Problems) -> str:
        return decode_file(path, problems, self.fallback)

    def inputs(self, path: Path, problems: Problems, column: str) -> Iterator[Row]:
        """A row for each line, read one by one; bytes that are not UTF-8 are replaced."""
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            for number, line in enumerate(stream, 1):
                yield {column: line.rstrip("\r\n"), "_file": str(path), "_line": number}
