"""What is odd about classes is reported with its counts before training, with the field that changes it."""

from __future__ import annotations

import unicodedata

import pandas as pd
import pytest

from peftkit.data.pipeline import prepare
from peftkit.errors import DataError
from peftkit.schema.recipe import Recipe

OFF = {"duplicates": "off", "leakage": "off", "near_duplicates": "off", "conflicts": "off"}


def prepared(path, task=None, cleaning=None, **data):
    values = {"source": str(path), "cleaning": OFF | (cleaning or {}), **data}
    recipe = {
        "name": "r",
        "model": {"source": "./m"},
        "task": {"kind": "classification", **(task or {})},
        "data": values,
    }
    return prepare(Recipe.parse(recipe))


def write(path, labels, texts=None):
    path.parent.mkdir(exist_ok=True)
    texts = texts or [f"text number {number}" for number in range(len(labels))]
    pd.DataFrame({"text": texts, "label": labels}).to_csv(path, index=False)
    return path


def step(result, name):
    return next((step for step in result.steps if step.name == name), None)


def rows_by_label(result):
    counts = pd.concat([pd.Series(list(split["label"])) for split in result.splits.values()]).value_counts()
    return {result.info.labels[label]: count for label, count in counts.items()}


def test_words_for_null_are_counted_as_they_stand_and_dropped_on_demand(tmp_path):
    labels, texts = ["a", "b", "nan", "a", "b"] * 8, [f"text number {number}" for number in range(40)]
    texts[3] = "N/A"
    path = write(tmp_path / "rows.csv", labels, texts)
    reported = prepared(path)
    found = step(reported, "null_words")
    assert (found.action, found.rows) == ("reported", 9)
    assert found.examples[0] == f"{path}:4: label 'nan' (see data.cleaning.null_words)"
    assert found.examples[1].startswith(f"{path}:5: text 'N/A'")
    assert rows_by_label(reported) == {"a": 16, "b": 16, "nan": 8}
    dropped = prepared(path, cleaning={"null_words": "drop"})
    assert (step(dropped, "null_words").action, step(dropped, "null_words").rows) == ("dropped", 9)
    frame = pd.read_csv(path).dropna()  # pandas takes the same words for missing values
    assert rows_by_label(dropped) == frame["label"].value_counts().to_dict()
    with pytest.raises(DataError, match=r"(?s)9 rows are wrong.*line 4, column 'label': .*found 'nan'") as caught:
        prepared(path, cleaning={"null_words": "error"})
    assert "data.cleaning.null_words=drop" in str(caught.value)


def test_dropping_words_for_null_leaves_numbers(tmp_path):
    path = write(tmp_path / "rows.csv", [*(f"{0.1 * row:.1f}" for row in range(39)), "nan"])
    result = prepared(path, cleaning={"null_words": "drop"})
    assert (result.info.problem_type, step(result, "null_words").rows) == ("regression", 1)


@pytest.mark.parametrize(
    "other",
    ["Café", "café ", "caf\u00e9\u00a0x", unicodedata.normalize("NFD", "café"), "CAFÉ"],
)
def test_names_that_look_alike_are_reported_with_their_rows_or_merged(other, tmp_path):
    name = "café x" if other.endswith("x") else "café"
    path = write(tmp_path / "rows.csv", ([name] * 3 + [other] + ["tea"] * 4) * 5)
    reported = prepared(path)
    if other.strip() == name:
        assert (reported.info.labels, step(reported, "similar_classes")) == ((name, "tea"), None)
        return
    found = step(reported, "similar_classes")
    assert len(reported.info.labels) == 3
    assert found.rows == pd.Series(list(reported.splits["train"]["label"])).isin([0, 1, 2]).sum() - sum(
        reported.info.labels[label] == "tea" for label in reported.splits["train"]["label"]
    )
    assert {repr(name), repr(other)} == {part.split(" (")[0] for part in found.examples[0].split(" ~ ")}
    assert "data.cleaning.similar_classes=merge" in found.examples[1]
    merged = prepared(path, cleaning={"similar_classes": "merge"})
    assert rows_by_label(merged) == {name: 20, "tea": 20}


def test_a_class_that_a_split_lacks_is_reported_with_its_rows_elsewhere(tmp_path):
    folder = tmp_path / "own"
    write(folder / "train.csv", ["a", "b", "c"] * 4)
    write(folder / "validation.csv", ["a", "b", "c"])
    write(folder / "test.csv", ["a", "b"])
    result = prepared(folder)
    found = step(result, "missing_classes")
    assert (found.split, found.rows) == ("test", 5)
    assert found.examples[0] == "'c' (0 here, 5 elsewhere)"
    assert "data.test_size" in found.examples[1]
    several = prepared(folder, labels=["a", "b", "c", "d"])
    assert {found.split for found in several.steps if found.name == "missing_classes"} == {
        "train",
        "validation",
        "test",
    }


def test_heavy_imbalance_is_reported_unless_the_recipe_weighs_classes(tmp_path):
    path = write(tmp_path / "rows.csv", (["a"] * 19 + ["b"]) * 5)
    found = step(prepared(path), "imbalance")
    counts = pd.Series(list(prepared(path).splits["train"]["label"])).value_counts()
    assert found.rows == counts[1]
    assert found.examples == (
        f"'a' ({counts[0]}), 'b' ({counts[1]})",
        "task.class_weights=balanced weighs them equally",
    )
    assert step(prepared(path, task={"class_weights": "balanced"}), "imbalance") is None
    assert step(prepared(write(tmp_path / "even.csv", ["a", "b"] * 20)), "imbalance") is None


def test_labels_of_several_per_row_are_counted_each(tmp_path):
    path = write(tmp_path / "rows.csv", ["a|B", "b", "a", "a|b"] * 10)
    found = step(prepared(path, label_separator="|"), "similar_classes")
    train = prepared(path, label_separator="|").splits["train"]
    by_name = dict(zip(("B", "a", "b"), pd.DataFrame(list(train["label"])).sum().astype(int).tolist()))
    assert found.examples[0] == f"'B' ({by_name['B']}) ~ 'b' ({by_name['b']})"
    assert found.rows == by_name["B"] + by_name["b"]


def test_pinned_labels_of_another_source_say_how_to_drop_them(tmp_path):
    path = write(tmp_path / "rows.csv", ["a", "b"] * 10)
    with pytest.raises(DataError, match=r"data.labels=null takes the labels from the source"):
        prepared(path, labels=["World", "Sports"])


@pytest.mark.parametrize("names", [[0, 1], ["0", "1"]])
def test_names_may_be_numbers(names, tmp_path):
    path = write(tmp_path / "rows.csv", [0, 1] * 10)
    result = prepared(path, labels=names, task={"class_weights": {names[1]: 3.0}})
    assert (result.info.labels, result.info.class_weights) == (("0", "1"), (1.0, 3.0))


def test_true_is_no_name():
    with pytest.raises(ValueError, match="quote it as the data spell it: 'True'"):
        prepared("x.csv", labels=[True, False])


def test_a_single_text_that_cannot_be_divided_says_why(tmp_path):
    (tmp_path / "small.txt").write_text("a short text\n\n" * 20)
    with pytest.raises(DataError, match=r"there is one row only .*under 24,000 characters"):
        prepare(
            Recipe.parse(
                {
                    "name": "r",
                    "model": {"source": "./m"},
                    "task": "style",
                    "data": {"source": str(tmp_path / "small.txt")},
                }
            )
        )


def test_a_table_of_one_row_per_label_is_not_read_as_one_label_per_text(tmp_path):
    texts = [f"text number {number // 2}" for number in range(40)]
    path = write(tmp_path / "long.csv", ["a", "b"] * 20, texts)
    with pytest.raises(DataError, match="texts of 40 of 40 rows of the train split also have another label"):
        prepared(path, cleaning={"conflicts": "report"})
    dropped = prepared(write(tmp_path / "half.csv", ["a", "b"] * 20, [*texts[:20], *map(str, range(20))]),
                       cleaning={"conflicts": "report"})  # fmt: skip
    assert step(dropped, "conflicts").rows == 20
