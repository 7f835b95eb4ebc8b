"""One table means one task, whatever file it is in; pandas writes the files, and scikit-learn and pandas judge."""

from __future__ import annotations

import io
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import MultiLabelBinarizer

from peftkit.data.loading import read_sources
from peftkit.data.mapping import canonical_rows, describe, describe_file
from peftkit.data.reader import readers
from peftkit.data.source import find_sources
from peftkit.errors import DataError, RecipeError
from peftkit.schema.recipe import DataConfig
from peftkit.schema.types import TaskInfo
from peftkit.tasks import label_spelling
from peftkit.tasks.classification import Classification

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
SEVERAL = ("biz", "sport", "tech")
ROWS = 24
FORMATS = ("csv", "tsv", "json", "jsonl", "parquet", "xlsx")
SETS = [["sport", "tech"], ["tech"], ["biz"], ["sport"]] * 6
PLACES = [[int(name in given) for name in SEVERAL] for given in SETS]
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@dataclass(frozen=True)
class Spelling:
    """Label cells repeated to ``ROWS`` rows, and what they mean: names of classes, numbers, or a refusal's words."""

    cells: list[Any]
    problem: str
    means: Any
    labels: tuple[str, ...] = ()
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[Any]:
        return (self.cells * ROWS)[:ROWS]

    def frame(self) -> pd.DataFrame:
        texts = [f"text number {row}" for row in range(ROWS)]
        if "label" in self.data:
            return pd.DataFrame([{"text": text, **dict(zip(SEVERAL, row))} for text, row in zip(texts, self.rows)])
        return pd.DataFrame({"text": texts, "label": self.rows})


def single(cells: list[Any], means: list[str], *labels: str, **options: Any) -> Spelling:
    return Spelling(cells, SINGLE, means, labels or tuple(sorted(set(means))), **options)


def multi(cells: list[Any], labels: tuple[str, ...] = SEVERAL, means: Any = SETS, **options: Any) -> Spelling:
    return Spelling(cells, MULTI, means, labels, **options)


def numbers(cells: list[Any], means: list[float], **options: Any) -> Spelling:
    return Spelling(cells, REGRESSION, means, ("label",), **options)


def asked(cells: list[Any], words: str, **options: Any) -> Spelling:
    return Spelling(cells, "asked", words, **options)


HALVES, THIRDS = [1.0, 1.5, 2.0], ["1.9", "1.10", "2.0"]
IDS = [[SEVERAL.index(name) for name in given] for given in SETS]
BY_ID = [[str(number) for number in row] for row in IDS]
AS = {"problem_type": SINGLE}
SPREAD = [round(0.37 * row + 0.05, 2) for row in range(ROWS)]
COLUMNS = {"label": SEVERAL}
SPELLINGS = {
    "words": single(["b", "a", "c"], ["b", "a", "c"]),
    "words with spaces": single([" b", "a", "b\u00a0"], ["b", "a", "b"]),
    "numbers from 0": single([0, 1], ["0", "1"]),
    "numbers from 1": single([10, 2, 1], ["10", "2", "1"], "1", "2", "10"),
    "numbers with -1": single([-1, 0, 1], ["-1", "0", "1"], "-1", "0", "1"),
    "whole floats": single([0.0, 1.0, 3.0], ["0", "1", "3"]),
    "whole numbers as text": single(["0", "1", "3"], ["0", "1", "3"]),
    "whole floats as text": single(["0.0", "1.0", "3.0"], ["0", "1", "3"]),
    "booleans": single([True, False], ["True", "False"]),
    "TRUE and FALSE": single(["TRUE", "FALSE"], ["True", "False"]),
    "yes and no": single(["yes", "no"], ["yes", "no"]),
    "padded codes": single(["007", "012", "123"], ["007", "012", "123"]),
    "codes like exponents": single(["1e5", "2e3", "3e1"], ["1e5", "2e3", "3e1"]),
    "codes in hex": single(["1e5", "4a1", "bee"], ["1e5", "4a1", "bee"]),
    "codes with underscores": single(["1_0", "2_0", "1_1"], ["1_0", "2_0", "1_1"]),
    "versions": single(THIRDS, THIRDS),
    "versions in three parts": single(["1.2.3", "1.10.0", "1.2"], ["1.2.3", "1.10.0", "1.2"]),
    "stars": single(["5 stars", "1 star"], ["5 stars", "1 star"]),
    "names with commas": single(["Food, Drink", "Arts"], ["Food, Drink", "Arts"]),
    "few decimals": asked(HALVES, r"3 different decimals in 24 rows \(1.0, 1.5, 2.0\): set task.problem_type"),
    "few decimals as classes": single(HALVES, ["1", "1.5", "2"], task=AS),
    "few decimals as numbers": numbers(HALVES, HALVES, task={"problem_type": REGRESSION}),
    "many decimals": numbers(SPREAD, SPREAD),
    "many decimals as text": numbers([f"{value:.2f}" for value in SPREAD], SPREAD),
    "small decimals": numbers([value * 1e-7 for value in SPREAD], [value * 1e-7 for value in SPREAD]),
    "whole numbers to predict": numbers([1, 5, 3], [1.0, 5.0, 3.0], task={"problem_type": REGRESSION}),
    "decimal commas": asked(["0,5", "1,25"], "'0,5' may be a number in local format"),
    "decimal commas to predict": numbers(["0,5", "1,25"], [0.5, 1.25], task={"problem_type": REGRESSION}),
    "thousands to predict": asked(["1,250", "10"], "found '1,250'", task={"problem_type": REGRESSION}),
    "percent": asked(["5%", "7.5%"], "'5%' may be a number in local format"),
    "percent as classes": single(["5%", "7.5%"], ["5%", "7.5%"], task=AS),
    "a word for null among numbers": asked(["0", "1", "nan"], "labels of mixed kinds.*null_words=drop"),
    "a word for null among words": single(["a", "b", "NULL"], ["a", "b", "NULL"]),
    "a missing label": asked(["a", "b", None], "no label in 8 of 24 rows"),
    "two forms of Unicode": single([NFC, NFD, "a"], [NFC, NFD, "a"]),
    "other case, merged": single(["Biz", "biz", "biz", "a"], ["biz", "biz", "biz", "a"],
                                 data={"cleaning": {"similar_classes": "merge"}}),
    "lists of names": multi(SETS),
    "lists of ids": multi(IDS, ("0", "1", "2"), BY_ID),
    "one-hot": multi(PLACES, ("0", "1", "2"), BY_ID),
    "one-hot floats": multi([[float(flag) for flag in row] for row in PLACES], ("0", "1", "2"), BY_ID),
    "one-hot booleans": multi([[bool(flag) for flag in row] for row in PLACES], ("0", "1", "2"), BY_ID),
    "one-hot with names": multi(PLACES, data={"labels": SEVERAL}),
    "two places": multi([[0, 1], [1, 0]], ("0", "1"), [["1"], ["0"]] * 12),
    "one-hot, too many names": asked(PLACES, "length 3 for 4 labels", data={"labels": (*SEVERAL, "war")}),
    "one-hot, a length off": asked([[0, 1, 1], [0, 1]], "of different lengths"),
    "one place": asked([[0], [1]], "a list of one 0 or 1 may be an id"),
    "shares": asked([[0.3, 0.7], [0.5, 0.5]], "a share of a label cannot be learned"),
    "a|b": asked(["|".join(row) for row in SETS], r"'sport\|tech' looks like several.*data.label_separator='\|'"),
    "a|b, separated": multi(["|".join(row) for row in SETS], data={"label_separator": "|"}),
    "a;b": asked([";".join(row) for row in SETS], "data.label_separator=';'"),
    "a; b, separated": multi(["; ".join(row) for row in SETS], data={"label_separator": ";"}),
    "a, b": asked([", ".join(row) for row in SETS], "data.label_separator=','"),
    "a, b, separated": multi([", ".join(row) for row in SETS], data={"label_separator": ","}),
    "a|b as classes": single(["a|b", "a", "b"], ["a|b", "a", "b"], task=AS),
    "columns of 0 and 1": multi(PLACES, data=COLUMNS),
    "columns of 0.0 and 1.0": multi([[float(flag) for flag in row] for row in PLACES], data=COLUMNS),
    "columns of booleans": multi([[bool(flag) for flag in row] for row in PLACES], data=COLUMNS),
    "columns of yes and no": multi([["no yes".split()[flag] for flag in row] for row in PLACES], data=COLUMNS),
    "columns with blanks": asked([[flag or None for flag in row] for row in PLACES], "a blank is not read as 0",
                                 data=COLUMNS),
}  # fmt: skip


def write(frame: pd.DataFrame, path: Path) -> Path:
    kind = path.suffix[1:]
    if kind in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    elif kind == "xlsx":
        frame.to_excel(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=kind == "jsonl")
    return path


def read(path: Path, spelling: Spelling, folder: Path, trained: TaskInfo | None = None) -> tuple[TaskInfo, list[Any]]:
    """Info and canonical labels of a file."""
    folder.mkdir()
    task = Classification(**spelling.task)
    data = DataConfig(source=str(path), **spelling.data)
    raw = read_sources(find_sources(data), task, data, folder)
    info = describe(raw, task, data) if trained is None else describe_file(raw, task, data, trained)
    rows, _ = canonical_rows(raw, task, data, info, folder)
    return info, list(rows.data["label"])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_format_of_a_table_is_the_same_task(name, kind, tmp_path):
    if f".{kind}" not in readers() or (kind == "xlsx" and find_spec("openpyxl") is None):
        pytest.skip(f"no reader of .{kind} files here")
    spelling = SPELLINGS[name]
    path = write(spelling.frame(), tmp_path / f"rows.{kind}")
    if spelling.problem == "asked":
        with pytest.raises(DataError, match=spelling.means):
            read(path, spelling, tmp_path / "read")
        return
    info, labels = read(path, spelling, tmp_path / "read")
    assert (info.problem_type, info.labels) == (spelling.problem, spelling.labels)
    means = (spelling.means * ROWS)[:ROWS]
    if spelling.problem == REGRESSION:
        assert labels == pytest.approx(pd.to_numeric(pd.Series(means)).tolist(), rel=1e-12)
    elif spelling.problem == MULTI:
        expected = MultiLabelBinarizer(classes=list(info.labels)).fit_transform(means)
        np.testing.assert_array_equal(np.array(labels), expected)
    else:
        assert labels == pd.Categorical(means, categories=info.labels).codes.tolist()
        assert Counter(info.labels[label] for label in labels) == pd.Series(means).value_counts().to_dict()


@pytest.mark.parametrize(
    ("trained", "other"),
    [
        ("lists of names", "a|b"),
        ("lists of names", "a, b"),
        ("a; b, separated", "lists of names"),
        ("one-hot", "one-hot booleans"),
        ("one-hot", "lists of ids"),
        ("lists of ids", "one-hot"),
        ("one-hot with names", "lists of names"),
        ("whole floats", "whole numbers as text"),
        ("booleans", "TRUE and FALSE"),
        ("columns of booleans", "columns of yes and no"),
        ("many decimals", "many decimals as text"),
    ],
)
def test_a_file_to_evaluate_on_may_be_spelled_otherwise(trained, other, tmp_path):
    one, another = SPELLINGS[trained], SPELLINGS[other]
    info, labels = read(write(one.frame(), tmp_path / "train.jsonl"), one, tmp_path / "one")
    _, again = read(write(another.frame(), tmp_path / "more.csv"), one, tmp_path / "another", info)
    assert again == labels


def test_places_are_not_guessed_for_a_run_that_learned_names(tmp_path):
    one, another = SPELLINGS["lists of names"], SPELLINGS["one-hot"]
    info, _ = read(write(one.frame(), tmp_path / "train.jsonl"), one, tmp_path / "one")
    with pytest.raises(DataError, match="lists of 0 and 1, but the run was trained on lists of names"):
        read(write(another.frame(), tmp_path / "more.jsonl"), one, tmp_path / "another", info)


def test_ids_of_a_file_stay_ids_where_two_places_would_fit_too(tmp_path):
    trained = TaskInfo(MULTI, ("0", "1"), integers="names")
    spelling = multi([[0, 1], [1, 0]], data={"labels": None})
    _, labels = read(write(spelling.frame(), tmp_path / "more.jsonl"), spelling, tmp_path / "read", trained)
    assert labels == [[1.0, 1.0]] * ROWS


def test_a_file_of_one_class_can_be_evaluated_and_one_with_others_cannot(tmp_path):
    trained, spelling = TaskInfo(SINGLE, ("a", "b")), single(["b"], ["b"])
    assert read(write(spelling.frame(), tmp_path / "b.csv"), spelling, tmp_path / "one", trained)[1] == [1] * ROWS
    other = single(["b", "bb"], [])
    with pytest.raises(DataError, match=r"label 'bb' of the train split is not among the 2 labels.*did you mean 'b'"):
        read(write(other.frame(), tmp_path / "bb.csv"), other, tmp_path / "two", trained)


@pytest.mark.parametrize(
    ("label", "found"),
    [
        ({"name": "sport"}, "objects such as {'name': 'sport'}"),
        ([["sport"]], "values of type list"),
        (pd.Timestamp("2024-01-01"), "values of type timestamp"),
        (b"sport", "values of type binary"),
    ],
)
def test_labels_of_other_types_are_one_message(label, found, tmp_path):
    path = write(Spelling([label], SINGLE, []).frame(), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="expected a word, a number or a list of them as label") as caught:
        read(path, Spelling([], SINGLE, []), tmp_path / "read")
    assert found in str(caught.value)
    assert (caught.value.line, caught.value.column) == (1, "label")


def test_objects_as_text_are_refused_like_objects(tmp_path):
    path = write(Spelling(['{"name": "sport"}'], SINGLE, []).frame(), tmp_path / "rows.csv")
    with pytest.raises(DataError, match=r"line 2.*found an object such as"):
        read(path, Spelling([], SINGLE, []), tmp_path / "read")


@pytest.mark.parametrize(
    ("task", "data", "error", "said"),
    [
        ({"problem_type": SINGLE}, {"label_separator": "|"}, RecipeError, "has one; leave one of them out"),
        ({}, {"label_separator": "/"}, DataError, r"no label of the train split has a '/'"),
        ({"problem_type": MULTI}, {}, DataError, "data.label_separator"),
        ({}, {"labels": ("sport", "tech", "biz")}, DataError, r"set data.label_separator='\|'"),
    ],
)
def test_a_separator_takes_effect_or_is_refused(task, data, error, said, tmp_path):
    spelling = Spelling(["sport|tech", "tech", "biz"], MULTI, [], task=task, data=data)
    with pytest.raises(error, match=said):
        read(write(spelling.frame(), tmp_path / "rows.csv"), spelling, tmp_path / "read")


def test_a_cell_of_an_empty_list_has_no_label_and_a_last_separator_adds_none(tmp_path):
    spelling = multi(["a|b", "a|", "[]"], ("a", "b"), data={"label_separator": "|"})
    _, labels = read(write(spelling.frame(), tmp_path / "rows.csv"), spelling, tmp_path / "read")
    assert labels[:3] == [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


def test_words_for_null_are_those_that_pandas_drops():
    words = [
        "nan",
        "NaN",
        "-nan",
        "NULL",
        "null",
        "None",
        "N/A",
        "n/a",
        "NA",
        "#N/A",
        "<NA>",
        "nil",
        "naan",
        "none of it",
    ]
    frame = pd.read_csv(io.StringIO("\n".join(["label", *words])))
    dropped = {word for word, value in zip(words, frame["label"], strict=True) if pd.isna(value)}
    assert {word for word in words if label_spelling.kind_of(word) == "missing"} == dropped | {"nil"}
