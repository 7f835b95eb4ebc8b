"""The contract of a data source: which rows ``data.source`` stands for.

A source is a class in a module of ``peftkit.data.sources``, or of an installed package through the entry-point group
``peftkit.sources``; docs/extending.md has an example.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from peftkit.data.problems import Problems
from peftkit.data.reader import Reader
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig
from peftkit.schema.registries import SOURCES
from peftkit.schema.types import Row
from peftkit.system.files import file_digest

SPLITS = ("train", "validation", "test")
ALIASES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What splits are called in sources → their name here."""
PLACE = ("_file", "_line", "_document", "_path")
"""Columns that say where a row comes from."""


class Source(ABC):
    """A data source, located by ``data.source`` when it is created, and read by ``rows``.

    Args:
        name: ``data.source``, or one of several.
        data: the recipe's section; ``subset``, ``revision``, ``splits`` and the columns' names are for the source.

    Raises:
        DataError: nothing can be read there; says what was expected.
        HubError: a remote source cannot be reached.
    """

    form: ClassVar[str]
    """How ``data.source`` is written, for messages: "package:NAME"."""
    rank: ClassVar[int] = 0
    """Order in which sources are asked whether they accept a name. Local paths (10) and the hub (20) come last."""
    on_hub: ClassVar[bool] = False
    """Whether the name is that of a data set of the Hugging Face hub, which model cards link."""
    splits: Sequence[str]
    """Which of train, validation and test there are."""

    def __init__(self, name: str, data: DataConfig) -> None:
        self.name, self.data = name, data

    @classmethod
    @abstractmethod
    def accepts(cls, name: str) -> bool:
        """Whether ``data.source`` means a source of this kind; nothing need exist under the name."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """A value that changes with the content: prepared rows are cached under it."""

    @abstractmethod
    def rows(self, split: str, problems: Problems) -> Iterator[Row]:
        """Raw rows of a split, with ``_file`` and ``_line`` (1-based), and ``_document`` where rows belong together.

        A bad row is added to ``problems``, and reading continues.
        """

    def class_names(self, split: str) -> dict[str, list[str]]:
        """Label column → names of its classes by id, where the source lists them."""
        return {}

    def place(self, split: str) -> str:
        """Where a split's rows come from, for messages."""
        return f"{self.name}[{split}]"


@dataclass(frozen=True)
class File:
    """A file and how it is read; ``extra`` columns are added to each of its rows."""

    path: Path
    reader: Reader
    extra: dict[str, str] = field(default_factory=dict)


class FileSource(Source):
    """A source whose splits are files on this machine."""

    def __init__(self, name: str, data: DataConfig) -> None:
        super().__init__(name, data)
        self.layout = self.find_files()
        self.splits = tuple(split for split in SPLITS if split in self.layout)

    @abstractmethod
    def find_files(self) -> dict[str, list[File]]:
        """The files of each split; raises DataError where there are none."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the files' paths and contents."""
        digest = hashlib.sha256()
        for split, files in self.layout.items():
            for file in files:
                parts = (split, str(file.path), str(sorted(file.extra.items())), file_digest(file.path))
                digest.update("\0".join(parts).encode() + b"\n")
        return digest.hexdigest()

    def rows(self, split: str, problems: Problems) -> Iterator[Row]:
        for file in self.layout[split]:
            for row in file.reader.rows(file.path, problems):
                yield {**row, **file.extra} if file.extra else row

    def class_names(self, split: str) -> dict[str, list[str]]:
        first = self.layout[split][0]
        return first.reader.class_names(first.path)

    def place(self, split: str) -> str:
        return str(self.layout[split][0].path)


def find_sources(data: DataConfig) -> list[Source]:
    """The sources of a recipe, located but not read; raises DataError or HubError, as they do when created."""
    sources = []
    for name in (data.source,) if isinstance(data.source, str) else data.source:
        kind = kind_of(name)
        if kind is None:
            raise DataError(f"data.source: expected {source_forms()}; found {name!r}")
        sources.append(kind(name, data))
    return sources


def kind_of(name: str) -> type[Source] | None:
    """The class of source that a name of ``data.source`` means; None if no class accepts it."""
    return next((kind for kind in _kinds() if kind.accepts(name)), None)


def source_forms(without: type[Source] | None = None) -> str:
    """What ``data.source`` may be: "a hub id, a file or folder or package:NAME"."""
    forms = [kind.form for kind in reversed(_kinds()) if kind is not without]
    return " or ".join([", ".join(forms[:-1]), forms[-1]])


def _kinds() -> list[type[Source]]:
    return sorted((SOURCES.get(name) for name in SOURCES), key=lambda kind: int(kind.rank))
