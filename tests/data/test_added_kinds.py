"""Sources and readers of an installed package take part like the built-in ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peftkit.data.reader import DocumentReader, Reader, reader_for, readers
from peftkit.data.source import Source, find_sources, source_forms
from peftkit.errors import DataError, RecipeError
from peftkit.schema.recipe import DataConfig
from peftkit.schema.registries import READERS, SOURCES

PLUGIN = '''
from dataclasses import dataclass

from peftkit.data.reader import DocumentReader, Reader
from peftkit.data.source import Source
from peftkit.errors import DataError


class Demo(Source):
    """Generated rows."""

    form = "demo:ROWS"
    splits = ("train", "test")
    digest = "demo 1"

    @classmethod
    def accepts(cls, name):
        return name.startswith("demo:")

    def rows(self, split, problems):
        for line in range(1, int(self.name.removeprefix("demo:")) + 1):
            yield {"text": f"{split} text {line}", "label": line % 2, "_file": self.name, "_line": line}

    def class_names(self, split):
        return {"label": ["even", "odd"]}


class Pairs(Reader):
    """Lines of label=text."""

    extensions = (".pairs",)

    def rows(self, path, problems):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            label, equals, text = line.partition("=")
            if equals:
                yield {"text": text, "label": label, "_file": str(path), "_line": number}
            else:
                problems.add(DataError("expected label=text", file=path, line=number))


@dataclass(frozen=True)
class Note(DocumentReader):
    """Notes, whose first line is a title."""

    extensions = (".note",)

    def text(self, path, problems):
        return path.read_text().partition("\\n")[2]
'''
POINTS = """[peftkit.sources]
demo = demo_rows:Demo
[peftkit.readers]
pairs = demo_rows:Pairs
note = demo_rows:Note
"""
CODE = """
import os, sys, json
from pathlib import Path
os.environ["PEFTKIT_CACHE"] = "cache"
from peftkit.data.pipeline import prepare
from peftkit.data.source import source_forms
from peftkit.errors import DataError
from peftkit.schema.recipe import Recipe

def rows(source):
    recipe = Recipe.parse({"name": "r", "model": {"source": "./m"}, "data": {"source": source}})
    prepared = prepare(recipe)
    return {name: [(row["text"], row["label"]) for row in split] for name, split in prepared.splits.items()}, prepared

splits, prepared = rows("demo:20")
assert prepared.info.labels == ("even", "odd")
assert set(splits["test"]) == {(f"test text {n}", n % 2) for n in range(1, 21)}
assert prepared.splits["test"][3]["_file"] == "demo:20"
assert "demo:ROWS" in source_forms()

lines = [f"{'ab'[n % 2]}=text {n}" for n in range(30)]
Path("train.pairs").write_text("\\n".join(lines))
splits, prepared = rows("train.pairs")
assert prepared.info.labels == ("a", "b") and sum(map(len, splits.values())) == 30
Path("bad.pairs").write_text("\\n".join([*lines, "nothing"]))
try:
    rows("bad.pairs")
except DataError as error:
    assert (str(error.file), error.line) == ("bad.pairs", 31), error
else:
    raise AssertionError

for label in "ab":
    (Path("notes") / label).mkdir(parents=True)
    for n in range(12):
        (Path("notes") / label / f"{n}.note").write_text(f"title\\n{label} note {n}")
splits, prepared = rows("notes")
assert sorted(text for split in splits.values() for text, _ in split)[0] == "a note 0"
print("torch" in sys.modules)
"""


def test_an_installed_package_adds_sources_and_readers(tmp_path):
    packages = tmp_path / "site"
    info = packages / "demo_rows-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: demo-rows\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (packages / "demo_rows.py").write_text(PLUGIN)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PYTHONPATH": f"{packages}:{root}", "HOME": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "False"


def test_built_in_kinds_follow_the_contract():
    for name in SOURCES:
        assert issubclass(SOURCES.get(name), Source)
        assert SOURCES.get(name).form
        assert SOURCES.get(name).__doc__
    for name in READERS:
        assert issubclass(READERS.get(name), Reader)
        assert all(ending.startswith(".") for ending in READERS.get(name).extensions)
    assert source_forms() == "a hub id, a file or folder or package:NAME"
    tables = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".xlsx", ".xlsm"}
    assert tables | {".conll", ".bio", ".iob", ".iob2"} == set(readers())
    assert issubclass(readers()[".txt"], DocumentReader)


def test_what_cannot_be_read_is_refused_with_the_kinds_that_can(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"expected a file ending in .*\.csv.*did you mean '\.csv'\?"):
        reader_for(tmp_path / "rows.cvs")
    with pytest.raises(DataError, match="unpack it first"):
        reader_for(tmp_path / "rows.csv.zst")
    with pytest.raises(DataError, match="expected a hub id, a file or folder or package:NAME; found ' '"):
        find_sources(DataConfig(source=" "))
    monkeypatch.setitem(READERS._items, "csv2", readers()[".csv"])
    with pytest.raises(RecipeError, match=r"two readers take \.csv files"):
        readers()


def test_sources_and_readers_are_light_to_import():
    code = (
        "import sys\nfrom peftkit.schema.registries import READERS, SOURCES\nREADERS.names(), SOURCES.names()\n"
        "print(sorted({'torch', 'datasets', 'pyarrow', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
