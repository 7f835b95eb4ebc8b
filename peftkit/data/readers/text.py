"""Text files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peftkit.data.decoding import Lines, decode_file, detect
from peftkit.data.problems import Problems
from peftkit.data.reader import DocumentReader
from peftkit.schema.registries import READERS
from peftkit.schema.types import Row


@READERS.register("txt")
@dataclass(frozen=True)
class TextReader(DocumentReader):
    """Text files, a document each; for predictions, a row per line."""

    extensions = (".txt",)
    unpacks = True

    fallback: str | None = None
    """Encoding of files that are not UTF-8; None makes them an error."""

    def text(self, path: Path, problems: Problems) -> str:
        text, form = decode_file(path, problems, self.encoding, self.fallback)
        if self.fallback is None and (remarks := form.remarks()):
            problems.note(path, f"read as {', '.join(remarks)}")
        return text

    def inputs(self, path: Path, problems: Problems, column: str) -> Iterator[Row]:
        """A row for each line, read one by one."""
        lines = Lines(path, problems, detect(path, self.encoding))
        for line in lines:
            yield {column: line.rstrip("\r\n"), "_file": str(path), "_line": lines.number}
