"""Files with a word per line and a blank line between sentences, as of the CoNLL shared tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from peftkit.data.decoding import Lines, detect
from peftkit.data.problems import Problems, shorten
from peftkit.data.reader import Reader
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig
from peftkit.schema.registries import READERS
from peftkit.schema.types import Row, Words

TOKENS, TAGS = "tokens", "tags"
DOCUMENT = "-DOCSTART-"


@READERS.register("conll")
@dataclass(frozen=True)
class ConllReader(Reader):
    """CoNLL files: ``tokens`` is the first column, ``tags`` the last, and ``column_2`` … those between.

    Columns are separated by tabs where a file has them, else by spaces. Lines that begin a document (-DOCSTART-) and
    comments (# and a space, before a sentence) are skipped. ``_line`` is the line of a sentence's first word.
    """

    extensions = (".conll", ".bio", ".iob", ".iob2")
    unpacks = True

    encoding: str | None = None
    """Of files that are not UTF-8; None detects it."""

    @classmethod
    def of(cls, data: DataConfig) -> ConllReader:
        return cls(data.encoding)

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        lines = Lines(path, problems, detect(path, self.encoding))
        sentence, width, tabs = _Sentence(), 0, False
        for line in lines:
            text = line.rstrip("\r\n")
            if not text.strip() or text.startswith(DOCUMENT):
                if sentence.words:
                    yield sentence.row(path)
                sentence = _Sentence()
                continue
            if text.startswith("# ") and not sentence.words:
                continue
            tabs = tabs or "\t" in text
            cells = [cell.strip() for cell in text.split("\t")] if tabs else text.split()
            width = width or len(cells)
            if width < 2:
                message = (
                    "expected a word and its tag, separated by a tab or a space, and a blank line after a sentence"
                )
                raise problems.fatal(DataError(f"{message}; found {shorten(text)}", file=path, line=lines.number))
            if len(cells) != width or not all(cells):
                message = f"expected {width} columns, as in the first line; found {len(cells)}: {shorten(text)}"
                problems.add(DataError(message, file=path, line=lines.number))
                continue
            sentence.line = sentence.line or lines.number
            sentence.words.append(cells)
        if sentence.words:
            yield sentence.row(path)
        if not width:
            raise DataError("the file is empty; expected a word and its tag per line", file=path)

    def inputs(self, path: Path, problems: Problems, column: str) -> Iterator[Row]:
        """A row per sentence: its words, joined by spaces and known as such, under ``column``."""
        for row in self.rows(path, problems):
            yield {column: Words(row[TOKENS]), "_file": row["_file"], "_line": row["_line"]}


@dataclass
class _Sentence:
    words: list[list[str]] = field(default_factory=list)
    line: int = 0

    def row(self, path: Path) -> Row:
        columns = [list(column) for column in zip(*self.words)]
        between = {f"column_{number}": column for number, column in enumerate(columns[1:-1], 2)}
        return {TOKENS: columns[0], **between, TAGS: columns[-1], "_file": str(path), "_line": self.line}
