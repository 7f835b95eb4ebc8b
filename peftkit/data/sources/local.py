"""Local files and folders: files named after splits, a folder of texts per label, loose documents, or one table."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from peftkit.data.reader import DocumentReader, ending_of, reader_for, readers
from peftkit.data.source import ALIASES, SPLITS, File, FileSource
from peftkit.data.sources.hub import HUB_ID
from peftkit.errors import DataError, did_you_mean
from peftkit.schema.recipe import DataConfig
from peftkit.schema.registries import SOURCES

OTHER_TEXTS = {".md", ".rst", ".text"}
"""Endings of texts that are not read, since a README among data is no document."""
UNLABELLED = ("unsup", "unlabeled", "unlabelled")
"""Folders of texts without a label, such as those of the IMDB reviews."""


@SOURCES.register("local")
class LocalSource(FileSource):
    """A file, or a folder of files: splits, one folder of texts per label, or documents."""

    form = "a file or folder"
    rank = 10

    @classmethod
    def accepts(cls, name: str) -> bool:
        """Whether the path exists, or the name can only be meant as a path."""
        if "\0" in name or not name.strip():
            return False
        if Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
            return True
        known = readers()
        return ending_of(Path(name)) in known or f".{name}" in (*known, ".text")

    def find_files(self) -> dict[str, list[File]]:
        path = Path(self.name).expanduser()
        if not path.exists():
            raise DataError(f"data.source: no such file or folder; {_nearest(path)}", file=path)
        layout = _layout(path, self.data)
        inside = [child for child in sorted(path.glob("*")) if child.is_file()]
        chosen = dict(layout)
        for split, name in self.data.splits.items():
            named = [child for child in inside if name in (child.name, child.stem)]
            if (key := ALIASES.get(name, name)) in layout:
                chosen[split] = layout[key]
            elif named:
                chosen[split] = [_open(named[0], self.data)]
            else:
                near = did_you_mean(name, {*layout, *(child.name for child in inside)})
                raise DataError(f"data.splits.{split}: {path} has no '{name}': {near}")
        taken = {ALIASES.get(name, name) for name in self.data.splits.values()}
        return {split: files for split, files in chosen.items() if split in self.data.splits or split not in taken}


def by_label(path: Path, data: DataConfig) -> list[File]:
    """Documents of a folder that has one folder per label; empty where it is not one."""
    documents = {ending: reader for ending, reader in readers().items() if issubclass(reader, DocumentReader)}
    return [
        File(text, documents[ending_of(text)].of(data), {data.label_columns[0]: folder.name})
        for folder in _visible(path)
        if folder.is_dir() and folder.name not in UNLABELLED
        for text in _visible(folder)
        if text.is_file() and ending_of(text) in documents
    ]


def _layout(path: Path, data: DataConfig) -> dict[str, list[File]]:
    """The files of each split; everything is ``train`` where nothing says otherwise."""
    if path.is_file():
        return {"train": [_open(path, data)]}
    named = _by_split(path, data) or _by_split(path / "data", data)
    return named or {"train": by_label(path, data) or _loose(path, data)}


def _open(path: Path, data: DataConfig, *, alone: bool = True) -> File:
    """The file with its reader; the text of a document is cut into sections, which belong together unless alone."""
    reader = reader_for(path)
    if issubclass(reader, DocumentReader):
        document = replace(reader.of(data), sections=True, document=None if alone else str(path))
        return File(path, document)
    return File(path, reader.of(data))


def _by_split(path: Path, data: DataConfig) -> dict[str, list[File]]:
    """Files and folders named after a split, with shards (train-00000-of-00002.parquet) in order."""
    known = readers()
    kinds: dict[str, dict[str, list[File]]] = {split: {} for split in SPLITS}
    for child in _visible(path):
        name = re.split(r"[-_.]", child.name.lower())[0]
        split = ALIASES.get(name)
        if split is None or (child.is_file() and ending_of(child) not in known):
            continue
        if files := [_open(child, data)] if child.is_file() else by_label(child, data):
            kind = f"{name}{ending_of(child) if child.is_file() else '/'}"
            kinds[split].setdefault(kind, []).extend(files)
    for split, named in kinds.items():
        if len(named) > 1:
            raise DataError(f"several sources for the {split} split: {', '.join(named)}; keep one of them", file=path)
    return {split: files for split, named in kinds.items() for files in named.values()}


def _loose(path: Path, data: DataConfig) -> list[File]:
    """The only table of a folder, or all its documents."""
    known = readers()
    files = [child for child in _visible(path) if child.is_file() and ending_of(child) in known]
    tables = [child for child in files if not issubclass(reader_for(child), DocumentReader)]
    if len(tables) == 1:
        return [_open(tables[0], data)]
    if tables:
        names = ", ".join(child.name for child in tables[:8])
        raise DataError(f"none of these is named train: {names}; name one in data.source", file=path)
    if not files:
        names = ", ".join(child.name for child in _visible(path)[:8]) or "nothing"
        expected = f"expected train, validation and test files ({', '.join(known)}), or one folder of texts per label"
        unread = {child.suffix.lower() for child in _visible(path) if child.is_file()}
        rename = (
            f"; texts are read from .txt files: rename the {min(unread & OTHER_TEXTS)} files"
            if unread & OTHER_TEXTS
            else ""
        )
        raise DataError(f"{expected}; found {names}{rename}", file=path)
    return [_open(text, data, alone=len(files) == 1) for text in files]


def _nearest(path: Path) -> str:
    """A hint at what does exist: the nearest name in the deepest folder that does."""
    path = Path(os.path.normpath(path))
    parent, name = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, name = parent.parent, parent.name
    return f"in {parent}: {did_you_mean(name, [child.name for child in _visible(parent)])}"


def _visible(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if not child.name.startswith((".", "__", "~$")))
