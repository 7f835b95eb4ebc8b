"""What a folder holds: files named after splits, one folder of texts a label, loose text files, or one data file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from peftkit.data.readers import READERS, Reader, read_sections, read_text
from peftkit.errors import DataError, did_you_mean
from peftkit.schema.recipe import DataConfig

Split = Literal["train", "validation", "test"]
ALIASES: dict[str, Split] = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
UNLABELLED = ("unsup", "unlabeled", "unlabelled")
"""Label folders that hold texts without a label, such as those of the IMDB reviews."""
SUFFIXES = (*READERS, ".txt")


@dataclass(frozen=True)
class File:
    """A file and how it is read; ``extra`` is added to each of its rows."""

    path: Path
    reader: Reader
    extra: dict[str, str] = field(default_factory=dict)


Layout = dict[str, list[File]]


def layout_of(path: Path, data: DataConfig) -> Layout:
    """Split → files of a file or folder; everything is ``train`` where nothing says otherwise.

    Raises:
        DataError: there is no such path (the nearest name beside it is given), or nothing in it can be read.
    """
    if path.is_file():
        return {"train": [open_file(path, data)]}
    if not path.is_dir():
        raise DataError(f"no such file or folder; {nearest(path)}", file=path)
    named = _by_split(path, data) or (_by_split(path / "data", data) if (path / "data").is_dir() else {})
    if named:
        return named
    labelled = by_label(path, data)
    if labelled:
        return {"train": labelled}
    return {"train": _loose(path, data)}


def open_file(path: Path, data: DataConfig, *, alone: bool = True) -> File:
    """The file with the reader of its suffix; a text file is one document, or sections where it stands alone."""
    suffix = path.suffix.lower()
    if suffix in READERS:
        return File(path, READERS[suffix])
    if suffix == ".txt":
        return File(path, partial(read_sections, column=data.text, document=None if alone else str(path)))
    said = f"a file of this kind cannot be read; expected one of {', '.join(SUFFIXES)}"
    if suffix in (".gz", ".zip", ".xz", ".bz2", ".zst"):
        said += "; unpack it first"
    raise DataError(said, file=path)


def nearest(path: Path) -> str:
    """A hint to what does exist: the nearest name in the deepest folder that is there."""
    path = Path(os.path.normpath(path))
    parent, name = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, name = parent.parent, parent.name
    names = [child.name for child in _visible(parent)]
    return f"in {parent}: {did_you_mean(name, names)}"


def by_label(path: Path, data: DataConfig) -> list[File]:
    """Texts of a folder with one folder a label; empty where it is not one."""
    label = data.label if isinstance(data.label, str) else data.label[0]
    folders = [child for child in _visible(path) if child.is_dir() and child.name not in UNLABELLED]
    files = [
        File(text, partial(read_text, column=data.text), {label: folder.name})
        for folder in folders
        for text in _visible(folder)
        if text.suffix.lower() == ".txt" and text.is_file()
    ]
    return files


def _by_split(path: Path, data: DataConfig) -> Layout:
    """Files and folders named after a split, with shards (train-00000-of-00002.parquet) in order."""
    found: dict[Split, dict[str, list[File]]] = {}
    for child in _visible(path):
        name = re.split(r"[-_.]", child.name.lower())[0]
        split = ALIASES.get(name)
        if split is None or (child.is_file() and child.suffix.lower() not in SUFFIXES):
            continue
        files = [open_file(child, data)] if child.is_file() else by_label(child, data)
        if files:
            kind = f"{name}{child.suffix.lower() if child.is_file() else '/'}"
            found.setdefault(split, {}).setdefault(kind, []).extend(files)
    for split, kinds in found.items():
        if len(kinds) > 1:
            raise DataError(f"several sources for the {split} split: {', '.join(kinds)}; keep one of them", file=path)
    return {split: next(iter(found[split].values())) for split in ("train", "validation", "test") if split in found}


def _loose(path: Path, data: DataConfig) -> list[File]:
    """The only data file of a folder, or all its text files as documents."""
    files = [child for child in _visible(path) if child.is_file() and child.suffix.lower() in SUFFIXES]
    texts = [child for child in files if child.suffix.lower() == ".txt"]
    tables = [child for child in files if child not in texts]
    if len(tables) == 1:
        return [open_file(tables[0], data)]
    if tables:
        names = ", ".join(child.name for child in tables[:8])
        raise DataError(f"none of these is named train: {names}; name one in data.source", file=path)
    if texts:
        return [open_file(text, data, alone=len(texts) == 1) for text in texts]
    names = ", ".join(child.name for child in _visible(path)[:8]) or "nothing"
    said = f"expected train, validation and test files ({', '.join(SUFFIXES)}), or one folder of .txt files a label"
    raise DataError(f"{said}; found {names}", file=path)


def _visible(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if not child.name.startswith((".", "__")))
