"""Files with labels in every spelling that training takes: trained, scored and predicted, judged by scikit-learn."""

from __future__ import annotations

import json
import shutil
import sys

import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import MultiLabelBinarizer

import peftkit
from peftkit.cli import app
from peftkit.errors import DataError
from peftkit.inference.predict_file import predict_file
from peftkit.planning.plan import make_plan
from peftkit.schema.recipe import replace

NAMES = ("biz", "sport", "tech")
SETS = [("sport", "tech"), ("tech",), ("biz",), ("sport",), ()] * 6
IDS = ["0", "1", "2", "1"] * 8
ROWS = {
    "one_hot": [[int(name in given) for name in NAMES] for given in SETS],
    "joined": ["|".join(given) for given in SETS],
    "listed": [[*given] for given in SETS],
    "columns": [[int(name in given) for name in NAMES] for given in SETS],
    "ids": [f"{number}.0" for number in IDS],
}
DATA = {
    "one_hot": {"labels": NAMES}, "joined": {"label_separator": "|"}, "listed": {}, "columns": {"label": NAMES},
    "ids": {},
}  # fmt: skip
SEEN = {kind: [row for row, given in zip(ROWS[kind], SETS if kind != "ids" else IDS) if given] for kind in ROWS}
"""The rows with a label: a blank cell is none, so the joined spelling cannot have a row without any."""


def frame(kind, rows):
    texts = [f"the {word} is row {number}" for number, word in zip(range(len(rows)), ["team", "bank", "game"] * 99)]
    if kind == "columns":
        return pd.DataFrame({"text": texts, **dict(zip(NAMES, zip(*rows)))})
    return pd.DataFrame({"text": texts, "label": rows})


def write(table, path):
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    return path


@pytest.fixture(scope="module")
def trained(bert, tmp_path_factory):
    """Runs of two steps by spelling, each trained on a file of its own."""
    runs = {}

    def train(kind, **data):
        if (kind, *data) not in runs:
            folder = tmp_path_factory.mktemp(kind)
            suffix = "jsonl" if kind in ("one_hot", "listed") else "csv"
            table = frame(kind, SEEN[kind])
            path = folder / f"rows.{suffix}"
            write(table, path) if not data else table.to_csv(path, index=False, sep=data["delimiter"])
            recipe = {
                "name": kind, "model": {"source": str(bert), "dtype": "float32"}, "method": {"kind": "frozen"},
                "data": {"source": str(path), "max_length": 32, **DATA[kind], **data}, "tracking": [],
                "task": {"kind": "classification", "threshold": 0.4},
                "training": {"max_steps": 2, "batch_size": 8, "threads": 1}, "evaluation": {"baselines": []},
                "export": {"prove": False}, "output_dir": str(folder / "runs"),
            }  # fmt: skip
            runs[kind, *data] = peftkit.train(peftkit.Recipe.parse(recipe), quiet=True, final=True).path
        return runs[kind, *data]

    return train


def predicted(run, file, out, **options):
    predict_file(run, file=file, column=None, out=out, **options)
    return pd.DataFrame([json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()])


@pytest.fixture
def scored(monkeypatch, capsys):
    """Metrics that ``peftkit evaluate RUN --file FILE`` prints."""

    def evaluate(run, file, *options):
        monkeypatch.setattr(sys, "argv", ["peftkit", "evaluate", *map(str, (run, "--file", file, "--json", *options))])
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert not stop.value.code
        return json.loads(capsys.readouterr().out)

    return evaluate


@pytest.mark.parametrize(
    ("kind", "spelling", "suffix"),
    [
        ("one_hot", "one_hot", "jsonl"), ("one_hot", "one_hot", "csv"), ("one_hot", "listed", "jsonl"),
        ("joined", "joined", "csv"), ("joined", "listed", "jsonl"), ("listed", "joined", "csv"),
        ("listed", "listed", "csv"), ("columns", "columns", "csv"), ("columns", "columns", "jsonl"),
    ],
)  # fmt: skip
def test_several_labels(kind, spelling, suffix, trained, tmp_path, scored):
    run = trained(kind)
    file = write(frame(spelling, SEEN[spelling]), tmp_path / f"rows.{suffix}")
    found = predicted(run, file, tmp_path / "out.jsonl")
    column = "predicted_label" if spelling != "columns" else "label"
    binarizer = MultiLabelBinarizer(classes=NAMES)
    gold = binarizer.fit_transform([given for given in SETS if given])
    answers = binarizer.transform(found[column])
    metrics = scored(run, file)
    assert metrics["exact_match"] == pytest.approx(accuracy_score(gold, answers))
    assert metrics["f1"] == pytest.approx(f1_score(gold, answers, average="macro", zero_division=0))


@pytest.mark.parametrize("labels", [SEEN["ids"], IDS, [int(one) for one in IDS], [float(one) for one in IDS]])
def test_ids(labels, trained, tmp_path, scored):
    run = trained("ids")
    for suffix in ("csv", "jsonl"):
        file = write(frame("ids", labels), tmp_path / f"rows.{suffix}")
        answers = predicted(run, file, tmp_path / f"{suffix}.jsonl")["predicted_label"]
        assert scored(run, file)["accuracy"] == pytest.approx(accuracy_score(IDS, answers))


def test_another_separator_than_the_recipes(trained, tmp_path, scored):
    run = trained("ids", delimiter=";")
    file = write(frame("ids", IDS), tmp_path / "rows.csv")
    with pytest.raises(DataError, match=r"no such column: known names: text,label; set --column, or --delimiter"):
        predicted(run, file, tmp_path / "out.jsonl")
    expected = predicted(run, write(frame("ids", IDS), tmp_path / "rows.jsonl"), tmp_path / "jsonl.jsonl")
    for delimiter in (",", "auto"):
        found = predicted(run, file, tmp_path / "out.jsonl", delimiter=delimiter)
        assert found["predicted_label"].tolist() == expected["predicted_label"].tolist()
        metrics = scored(run, file, "--delimiter", delimiter)
        assert metrics["accuracy"] == pytest.approx(accuracy_score(IDS, found["predicted_label"]))


def test_missing_data_are_reported_before_a_model_that_cannot_be_had(trained, tmp_path):
    recipe = peftkit.Recipe.from_yaml(trained("ids") / "recipe.yaml")
    recipe = replace(recipe, model={"source": "./no_such_model"}, data={"source": str(tmp_path / "no_such.csv")})
    for command in (peftkit.train, peftkit.inspect, make_plan):
        with pytest.raises(DataError, match=r"no_such\.csv: data\.source: no such file"):
            command(recipe)


def test_a_missing_file_is_reported_before_a_base_that_is_gone(trained, tmp_path):
    run = shutil.copytree(trained("ids"), tmp_path / "run")
    config = run / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("bert", "gone"), encoding="utf-8")
    missing = tmp_path / "no_such.csv"
    for use in (
        lambda: peftkit.evaluate(run, file=missing),
        lambda: predicted(run, missing, tmp_path / "out.jsonl"),
    ):
        with pytest.raises(DataError, match=r"no_such\.csv: .*no such file"):
            use()
