"""The commands compare and tune: what they hand on, what they print where, and with which code they end."""

from __future__ import annotations

import json
import sys

import pytest

from peftkit.cli import app
from peftkit.experiments import compare, tune
from peftkit.experiments.compare import Comparison


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs ``peftkit …`` in this process; gives exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["peftkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


TABLE = {"name": "x", "metric": "accuracy", "variants": [{"variant": "lora", "status": "failed", "said": ["no room"]}],
         "baselines": [], "pick": "No variant has finished."}  # fmt: skip


def test_compare_hands_over_recipes_changes_and_options(call, monkeypatch, tmp_path):
    seen = {}

    def stand_in(recipes, **options):
        seen.update(options, recipes=recipes)
        return Comparison(TABLE, tmp_path)

    monkeypatch.setattr(compare, "compare", stand_in)
    code, out, _ = call("compare", "bbc_news_lora", "training.epochs=1", "own_csv", "--methods", "lora, frozen",
                        "--vary", "method.rank=4,8", "--seeds", 3, "--jobs", 2, "--out", tmp_path)  # fmt: skip
    assert code == 0
    assert seen["recipes"] == ["bbc_news_lora", "own_csv"]
    assert (seen["changes"], seen["methods"]) == (["training.epochs=1"], ["lora", "frozen"])
    assert (seen["vary"], seen["seeds"], seen["jobs"], seen["out"]) == (["method.rank=4,8"], 3, 2, tmp_path)
    assert "lora: failed: no room" in out
    assert "compare.html" in out
    assert json.loads(call("compare", "bbc_news_lora", "--json")[1]) == TABLE


@pytest.mark.parametrize(
    ("options", "pruner"), [([], None), (["--prune"], "median"), (["--pruner", "halving"], "halving")]
)
def test_tune_hands_over_the_space_and_its_options(call, monkeypatch, options, pruner):
    seen = {}

    def stand_in(recipe, space, **given):
        seen.update(given, recipe=recipe, space=space)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "tune", stand_in)
    code, _, _ = call("tune", "own_csv", "data.source=x.csv", "--space", "a.b=1..2", "--space", "s.yaml", "--trials", 7,
                      "--sampler", "grid", "--timeout", "30m", "--rows", 50, *options)  # fmt: skip
    assert code == 130
    assert (seen["recipe"], seen["changes"], seen["space"]) == (
        "own_csv",
        ["data.source=x.csv"],
        ["a.b=1..2", "s.yaml"],
    )
    assert (seen["trials"], seen["sampler"], seen["timeout"], seen["rows"]) == (7, "grid", "30m", 50)
    assert seen["pruner"] == pruner


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "bbc_nwes_lora"], "did you mean 'bbc_news_lora'"),
        (["compare", "bbc_news_lora", "--methods", "loar"], "did you mean 'lora'"),
        (["compare", "training.epochs=1"], "expected at least one recipe"),
        (["tune", "bbc_news_lora"], "expected at least one"),
        (["tune", "bbc_news_lora", "--space", "training.learning_rte=1e-5..1e-2"], "did you mean 'learning_rate'"),
        (["tune", "bbc_news_lora", "--space", "method.rank=0,4"], "method.rank"),
        (["tune", "bbc_news_lora", "--space", "nowhere.yaml"], "cannot be read"),
    ],
    ids=" ".join,
)
def test_wrong_words_are_one_message_and_code_2(call, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
