"""Some hundred tables, written by pandas in random ways and partly damaged: each is read right or refused.

Right is what was written, or for a damaged file what pandas reads from it when told how it was written.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pandas
import pytest

from peftkit.data.problems import Problems
from peftkit.data.reader import reader_for
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig

PIECES = [
    "plain",
    "a, b",
    "x; y",
    '"quoted"',
    "it's",
    "bar | bar",
    "tab\tx",
    "two\nlines",
    "é à ü",
    "5 €",
    "3,5",
    "",
    " ",
    "\\",
]
LABELS = [["pos", "neg"], ["0", "1"], ["1.0", "2.5"], ["a;b", "c"], ["a, b", "c"], ["True", "False"], ["é", "ß"]]
SEPARATORS = [",", ";", "\t", "|"]
ENCODINGS = ["utf-8", "utf-8", "utf-8-sig", "cp1252", "utf-16", "latin-1"]


def table(generator: random.Random) -> pandas.DataFrame:
    def text(row):
        return " ".join(generator.choice(PIECES) for _ in range(generator.randint(1, 5))) + f" {row}"

    rows = range(generator.randint(3, 20))
    labels = generator.choice(LABELS)
    frame = pandas.DataFrame({"text": [text(row) for row in rows], "label": [generator.choice(labels) for _ in rows]})
    return frame.assign(more=[text(row) for row in rows]) if generator.random() < 0.3 else frame


def written(frame: pandas.DataFrame, generator: random.Random) -> tuple[bytes, dict]:
    """A CSV file, and how pandas is told to read it."""
    how = {"sep": generator.choice(SEPARATORS), "encoding": generator.choice(ENCODINGS)}
    if generator.random() < 0.2:
        how["quotechar"] = "'"
    quoting = generator.choice([0, 0, 1])
    text = frame.to_csv(
        index=False, sep=how["sep"], quotechar=how.get("quotechar", '"'), quoting=quoting,
        lineterminator=generator.choice(["\n", "\n", "\r\n"]),
    )  # fmt: skip
    return text.encode(how["encoding"], "replace"), how


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The file with a byte removed, added, repeated or changed, a line removed, or its end cut off."""
    place = generator.randrange(len(content))
    kind = generator.randrange(6)
    if kind == 0:
        return content[:place] + content[place + 1 :]
    if kind == 1:
        return (
            content[:place]
            + generator.choice([b'"', b"'", b",", b";", b"\n", b"\r", b"\\", b"\xe9", b"\0"])
            + content[place:]
        )
    if kind == 2:
        return content[:place] + content[max(0, place - 5) :]
    if kind == 3:
        return content[:place] + bytes([generator.randrange(256)]) + content[place + 1 :]
    if kind == 4:
        lines = content.split(b"\n")
        del lines[generator.randrange(len(lines))]
        return b"\n".join(lines)
    return content[:place]


def rows_of(path) -> pandas.DataFrame | None:
    """The rows as a frame; None if the file is refused."""
    problems = Problems()
    try:
        rows = list(reader_for(path).of(DataConfig(source=str(path))).rows(path, problems))
        problems.check()
    except DataError:
        return None
    return pandas.DataFrame(rows).drop(columns=["_file", "_line"], errors="ignore")


def as_told(path, how) -> Iterator[pandas.DataFrame]:
    """What pandas reads of a file that was written so; a foreign byte makes an ASCII file cp1252."""
    options = {"dtype": str, "keep_default_na": False, "engine": "python", "encoding_errors": "replace"}
    for encoding in (how["encoding"], "cp1252"):
        try:
            yield pandas.read_csv(path, **options, **{**how, "encoding": encoding}).rename(columns=str.strip)
        except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeError):
            continue


def same(one: pandas.DataFrame, other: pandas.DataFrame) -> bool:
    return list(one.columns) == list(other.columns) and one.values.tolist() == other.values.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_csv_files_written_in_random_ways(tmp_path, seed):
    generator, refused = random.Random(seed), 0
    path = tmp_path / "rows.csv"
    for _ in range(20):
        frame = table(generator)
        content, how = written(frame, generator)
        path.write_bytes(content)
        expected = pandas.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False, **how)
        rows = rows_of(path)
        refused += rows is None
        assert rows is None or same(rows, expected), (how, content)
    assert refused <= 6


@pytest.mark.parametrize("seed", range(10, 20))
def test_damaged_csv_files(tmp_path, seed):
    generator, read = random.Random(seed), 0
    path = tmp_path / "rows.csv"
    for _ in range(30):
        content, how = written(table(generator), generator)
        content = damaged(content, generator)
        path.write_bytes(content)
        rows = rows_of(path)
        if rows is None or not len(rows):
            continue
        read += 1
        assert any(same(rows, frame) for frame in as_told(path, how)), (how, content)
    assert read >= 5


@pytest.mark.parametrize("seed", range(20, 24))
def test_json_and_excel_files_written_in_random_ways(tmp_path, seed):
    pytest.importorskip("openpyxl")
    generator = random.Random(seed)
    for _ in range(12):
        frame = table(generator)
        orient = generator.choice(["records", "split", "index", "columns"])
        compression = generator.choice(["", ".gz", ".zip"])
        paths = [tmp_path / f"rows.json{compression}", tmp_path / "rows.jsonl", tmp_path / "rows.xlsx"]
        frame.to_json(paths[0], orient=orient, indent=generator.choice([None, 1]))
        frame.to_json(paths[1], orient="records", lines=True, force_ascii=generator.random() < 0.5)
        frame.to_excel(paths[2], index=generator.random() < 0.5)
        for path in paths:
            rows = rows_of(path)
            assert rows is not None
            assert same(rows, frame), path
