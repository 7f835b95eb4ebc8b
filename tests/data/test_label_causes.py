"""What is odd about labels and rows is explained: the cause, how many rows, and what to set."""

from __future__ import annotations

import json
import zipfile
from collections import Counter

import pandas as pd
import pytest

from peftkit.data.pipeline import prepare
from peftkit.errors import DataError
from peftkit.schema.recipe import Recipe

OFF = {"duplicates": "off", "leakage": "off", "near_duplicates": "off", "conflicts": "off"}
COUNT = 40
TEXTS = [f"text number {number}" for number in range(COUNT)]


def prepared(path, task="classification", cleaning=None, **data):
    values = {"source": str(path), "cleaning": OFF | (cleaning or {}), **data}
    return prepare(Recipe.parse({"name": "r", "model": {"source": "./m"}, "task": {"kind": task}, "data": values}))


def refused(path, task="classification", **data):
    with pytest.raises(DataError) as caught:
        prepared(path, task, **data)
    return str(caught.value)


def step(result, name):
    return next((step for step in result.steps if step.name == name), None)


def kept(result):
    return sorted(text for split in result.splits.values() for text in split["text"])


@pytest.fixture
def csv(tmp_path):
    def write(labels, name="rows.csv", **columns):
        values = {"label": labels} if labels is not None else columns
        frame = pd.DataFrame({"text": TEXTS, **{key: (cells * COUNT)[:COUNT] for key, cells in values.items()}})
        frame.to_csv(tmp_path / name, index=False)
        return tmp_path / name

    return write


@pytest.fixture
def jsonl(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("task", "usual", "odd", "column"),
    [
        ("classification", {"text": "", "label": "a"}, {"body": "", "label": "b"}, "text"),
        ("classification", {"text": "", "label": "a"}, {"text": "", "topic": "a"}, "label"),
        ("instruction", {"instruction": "", "output": "x"}, {"prompt": "", "completion": "x"}, "output"),
        ("style", {"text": ""}, {"content": ""}, "text"),
    ],
)
def test_rows_with_other_keys_are_named_with_cause_and_remedy(task, usual, odd, column, jsonl):
    rows = [
        {key: value or text for key, value in (odd if number % 8 == 2 else usual).items()}
        for number, text in enumerate(TEXTS)
    ]
    lacking = pd.DataFrame(rows)[column].isna().sum()
    message = refused(jsonl(rows), task)
    assert f"{lacking} rows have no '{column}' at all, first" in message
    assert f"rows.jsonl:3, whose keys are {', '.join(odd)}: give all rows the same keys" in message


def test_a_null_is_no_missing_key(jsonl):
    assert "at all" not in refused(jsonl([{"text": text, "label": None} for text in TEXTS]))


def test_minus_one_next_to_zero_and_one_is_remarked_on(csv):
    path = csv([0, 1, -1])
    result = prepared(path)
    remark = step(result, "negative_class")
    assert result.info.labels == ("-1", "0", "1")
    assert remark.rows == Counter(result.splits["train"]["label"])[0]
    assert "where -1 stands for no label" in remark.examples[1]
    for labels in ([1, -1], [0, 1], [-2, -1, 0]):
        assert step(prepared(csv(labels)), "negative_class") is None


def test_merged_classes_are_counted(csv):
    labels = ["Biz", "biz", "biz", "tech", "BIZ"]
    result = prepared(csv(labels), cleaning={"similar_classes": "merge"})
    remark, counts = step(result, "similar_classes"), Counter((labels * COUNT)[:COUNT])
    assert result.info.labels == ("biz", "tech")
    assert remark.rows == counts["Biz"] + counts["BIZ"]
    assert set(remark.examples[0].split(", ")) == {
        f"'Biz' read as 'biz' ({counts['Biz']} rows)", f"'BIZ' read as 'biz' ({counts['BIZ']} rows)"
    }  # fmt: skip
    assert step(prepared(csv(["a", "b"]), cleaning={"similar_classes": "merge"}), "similar_classes") is None


def test_merged_classes_are_counted_where_a_row_has_several(csv):
    result = prepared(csv(["a|B", "b", "a"]), cleaning={"similar_classes": "merge"}, label_separator="|")
    counts = Counter((["a|B", "b", "a"] * COUNT)[:COUNT])
    assert result.info.labels == ("a", "b") if counts["b"] > counts["a|B"] else ("B", "a")
    assert step(result, "similar_classes").rows in (counts["a|B"], counts["b"])


NULL_LABELS = {
    "separator": (["a", "a|b", "b|nan", "NULL"], {"label_separator": "|"}),
    "spelled": (["['a']", "['a', 'b']", "['N/A']", "[]"], {}),
    "number": ([f"{number * 0.37:.2f}" for number in range(30)] + ["nan"], {}),
}


@pytest.mark.parametrize("kind", NULL_LABELS)
def test_rows_with_a_word_for_a_missing_label_are_dropped_in_every_kind_of_task(kind, csv):
    labels, data = NULL_LABELS[kind]
    path = csv(labels)
    words = pd.read_csv(path, keep_default_na=False)["label"].str.contains("nan|NULL|N/A")
    result = prepared(path, cleaning={"null_words": "drop"}, **data)
    dropped = step(result, "null_words")
    assert (dropped.action, dropped.rows) == ("dropped", words.sum())
    assert kept(result) == sorted(pd.Series(TEXTS)[~words])
    expected = {"separator": ("a", "b"), "spelled": ("a", "b"), "number": ("label",)}
    assert result.info.labels == expected[kind]
    assert "data.cleaning.null_words=drop" in refused(path, cleaning={"null_words": "error"}, **data)


def test_rows_with_a_word_for_a_missing_label_in_a_list(jsonl):
    labels = [["a"], ["a", "b"], ["b", "nan"]]
    path = jsonl([{"text": text, "label": labels[number % 3]} for number, text in enumerate(TEXTS)])
    reported = prepared(path)
    assert (reported.info.labels, step(reported, "null_words").rows) == (("a", "b", "nan"), 13)
    dropped = prepared(path, cleaning={"null_words": "drop"})
    assert (dropped.info.labels, step(dropped, "null_words").rows) == (("a", "b"), 13)


def test_rows_with_a_word_for_a_missing_label_in_a_column_of_several(csv):
    path = csv(None, biz=[0, 1, 1, "nan"], tech=[1, "N/A", 0, 1])
    frame = pd.read_csv(path)  # pandas takes the same words for missing values
    assert "data.cleaning.null_words=drop leaves such rows out" in refused(path, label=["biz", "tech"])
    result = prepared(path, cleaning={"null_words": "drop"}, label=["biz", "tech"])
    assert kept(result) == sorted(frame.dropna()["text"])
    rows = pd.DataFrame([label for split in result.splits.values() for label in split["label"]])
    assert rows.sum().tolist() == frame.dropna()[["biz", "tech"]].sum().tolist()


def test_a_file_without_a_header_is_called_that(tmp_path, csv):
    path = tmp_path / "rows.csv"
    pd.DataFrame({"text": TEXTS, "label": ["a", "b"] * 20}).to_csv(path, index=False, header=False)
    assert "the first line is read as names, but looks like a row: 'text number 0', 'a'" in refused(path)
    sentences = pd.DataFrame({"text": [f"it was the best of times {n}" for n in range(3)], "label": ["a", "b", "c"]})
    sentences.to_csv(path, index=False, header=False)
    assert "begin the file with a line of column names, such as text,label" in refused(path)
    message = refused(csv(None, topic=["a", "b"]))
    assert "no such column: known names: text, topic; set data.label" in message


def test_columns_inside_others_and_of_several_types_are_named(jsonl):
    inside = [{"review": {"body": text, "lang": "en"}, "label": "ab"[n % 2]} for n, text in enumerate(TEXTS)]
    assert "what is inside 'review' (body, lang) is not looked at" in refused(jsonl(inside))
    mixed = [{"text": text, "score": n if n % 2 else str(n)} for n, text in enumerate(TEXTS)]
    assert "known names: score, text; set data.label" in refused(jsonl(mixed))


@pytest.mark.parametrize(
    ("value", "name"), [(["a"], "lists"), ({"a": 1}, "objects"), (1.5, "numbers"), (True, "true or false")]
)
def test_the_type_of_a_column_is_named_in_words(value, name, jsonl):
    path = jsonl([{"text": value, "label": "a"}] * 5)
    assert f"data.text must name a column of text, found {name}; columns of text: label" in refused(path)


def test_one_decimal_is_one(csv):
    assert "1 decimal in 40 rows (0.5)" in refused(csv([0.5]))
    assert "2 different decimals in 40 rows (0.5, 1.5)" in refused(csv([0.5, 1.5]))
    message = refused(csv([*range(30), "inf"]))
    assert "numbers (30 different) and words ('inf'); the rarer is 'inf', here first" in message
    assert "fill or remove rows without one" in message


def test_several_tables_in_one_file_say_how_they_are_read(tmp_path):
    rows = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(TEXTS)]
    path = tmp_path / "both.json"
    path.write_text(json.dumps({"train": rows[:30], "test": rows[30:]}), encoding="utf-8")
    message = refused(path)
    assert "there are rows under train, test" in message
    assert "data.subset" in message
    assert "into a file of a folder (train.json, test.json)" in message
    chosen = prepared(path, subset="test", test_size=0)
    assert kept(chosen) == sorted(TEXTS[30:])
    archive = tmp_path / "both.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for split, part in (("train", rows[:30]), ("test", rows[30:])):
            file.writestr(f"{split}.csv", pd.DataFrame(part).to_csv(index=False))
    assert "found 2 files (train.csv, test.csv); unpack it and name the folder" in refused(archive)
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "folder")
    assert len(prepared(tmp_path / "folder").splits["test"]) == 10


def test_what_stands_next_to_the_rows_of_a_json_file_is_left_out_aloud(tmp_path):
    rows = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(TEXTS)]
    path = tmp_path / "rows.json"
    for key in ("data", "rows"):
        path.write_text(json.dumps({"version": 1, key: rows}), encoding="utf-8")
        assert f"the rows are those under '{key}'; left out: version" in step(prepared(path), "reading").examples[0]


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        (("question", "answer"), "data.columns.instruction=question data.columns.output=answer"),
        (("prompt", "response"), "data.columns.instruction=prompt data.columns.output=response"),
        (("instruction", "context", "response"), "data.columns.output=response data.columns.input=context"),
    ],
)
def test_columns_of_questions_and_answers_are_recognized(names, fields, jsonl):
    path = jsonl([{name: f"{name} {text}" for name in names} for text in TEXTS])
    message = refused(path, "instruction")
    assert f"set {fields}, if these are the question and its answer" in message
    columns = dict(field.removeprefix("data.columns.").split("=") for field in fields.split())
    assert sum(map(len, prepared(path, "instruction", columns=columns).splits.values())) == COUNT


def test_two_documents_are_refused_without_a_word_of_labels(jsonl):
    message = refused(jsonl([{"text": text} for text in TEXTS[:2]]), "style")
    assert "no validation split can be held out: of 2 rows, one is left for training; add rows, or put" in message
    assert "label" not in message
    assert len(kept(prepared(jsonl([{"text": text} for text in TEXTS[:3]]), "style"))) == 3
