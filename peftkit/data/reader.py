"""The contract of a file reader: how files of one kind become rows.

A reader is a class in a module of ``peftkit.data.readers``, or of an installed package through the entry-point group
``peftkit.readers``; docs/extending.md has an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from peftkit.data.archives import ARCHIVES, OTHER_ARCHIVES, inner_ending, open_binary
from peftkit.data.problems import Problems
from peftkit.errors import DataError, RecipeError, did_you_mean
from peftkit.schema.recipe import DataConfig
from peftkit.schema.registries import READERS
from peftkit.schema.types import Row

SECTION = 16_000
"""Characters of a section of a document, about."""


class Reader(ABC):
    """Reads files of one kind as rows."""

    extensions: ClassVar[tuple[str, ...]]
    """Endings of the files' names, in lower case, with the dot."""
    unpacks: ClassVar[bool] = False
    """Whether it opens files by ``archives.open_binary``, so that they may be compressed."""

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """The reader with what the recipe says about files: ``encoding``, ``delimiter``, ``quote``, ``subset``."""
        return cls()

    @abstractmethod
    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        """The rows of a file, with ``_file`` and ``_line`` (1-based: where the record starts).

        A bad row is added to ``problems``, and reading continues; what cannot be read past is raised as
        ``problems.fatal(DataError(…, file=path, line=…))``. Rows are yielded one by one, so that a file need not fit in
        memory. What the user should know about how the file is read is added with ``problems.note``.
        """

    def class_names(self, path: Path) -> dict[str, list[str]]:
        """Column → names of its classes by id, where the file itself lists them."""
        return {}

    def inputs(self, path: Path, problems: Problems, column: str) -> Iterator[Row]:
        """Rows to predict for: the file's own, or the lines of a document under ``column``."""
        return self.rows(path, problems)


@dataclass(frozen=True)
class DocumentReader(Reader):
    """Reads files that hold one text each, and so have no columns."""

    column: str = "text"
    """Name of the column that the text gets."""
    sections: bool = False
    """Whether the text is cut into rows of about ``SECTION`` characters at blank lines; joined, they are the text."""
    document: str | None = None
    """``_document`` of all sections; None makes every section a document of its own."""
    encoding: str | None = field(default=None, kw_only=True)
    """Of a file that is not UTF-8; None detects it."""

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        return cls(data.text, encoding=data.encoding)

    @abstractmethod
    def text(self, path: Path, problems: Problems) -> str:
        """The file's text, with lines ending in a newline."""

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        text, line, start = self.text(path, problems), 1, 0
        if not self.sections:
            yield {self.column: text, "_file": str(path), "_line": 1}
            return
        while start < len(text):
            end = text.find("\n\n", start + SECTION)
            end = len(text) if end < 0 or len(text) - end < SECTION // 2 else end + 2
            section = text[start:end]
            document = self.document or f"{path}:{line}"
            yield {self.column: section, "_document": document, "_file": str(path), "_line": line}
            line += section.count("\n")
            start = end

    def inputs(self, path: Path, problems: Problems, column: str) -> Iterator[Row]:
        for number, line in enumerate(self.text(path, problems).split("\n"), 1):
            yield {column: line, "_file": str(path), "_line": number}


def readers() -> dict[str, type[Reader]]:
    """Ending of a file's name → its reader, for all files that can be read."""
    known: dict[str, type[Reader]] = {}
    for name in READERS:
        for ending in READERS.get(name).extensions:
            if ending in known:
                raise RecipeError(f"two readers take {ending} files; uninstall the package that adds '{name}'")
            known[ending] = READERS.get(name)
    return known


def ending_of(path: Path) -> str:
    """The ending of a file's name, in lower case; of a compressed file, that of the file inside where there is one."""
    suffix = path.suffix.lower()
    if suffix not in ARCHIVES:
        return suffix
    try:
        return inner_ending(path)
    except DataError:
        return suffix  # opening it says why


def reader_for(path: Path) -> type[Reader]:
    """The reader of a file, by the ending of its name; raises DataError where there is none."""
    suffix, ending, known = path.suffix.lower(), ending_of(path), readers()
    if ending in known and (suffix == ending or known[ending].unpacks):
        return known[ending]
    if ending in ARCHIVES:
        with open_binary(path):
            pass
    inside = f" with a {ending or 'nameless'} file inside" if suffix in ARCHIVES else ""
    hint = did_you_mean(ending, known)
    if suffix in OTHER_ARCHIVES or ending in known:
        hint = "unpack it first"
    elif ending in (".xls", ".ods"):
        hint = "save the sheet as .xlsx or .csv"
    raise DataError(f"cannot be read{inside}: expected a file ending in {', '.join(known)}; {hint}", file=path)
