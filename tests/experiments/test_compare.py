"""Comparisons on tiny models: every variant on the same rows, a table that can be trusted, nothing lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy.stats import binomtest

import peftkit
from peftkit import replace
from peftkit.data.pipeline import prepare
from peftkit.errors import Interrupted, RecipeError, RunError
from peftkit.experiments import jobs
from peftkit.experiments.jobs import InProcessRunner, Outcome
from peftkit.experiments.variants import parse_vary, variants
from peftkit.reporting import experiment


@pytest.fixture
def quick(small_recipe):
    """One epoch."""
    return replace(small_recipe, training={"epochs": 1})


def here(recipe, out, **options):
    return peftkit.compare(recipe, out=out, isolated=False, quiet=True, **options)


def lines(run, split="test"):
    return [json.loads(line) for line in (Path(run) / "predictions" / f"{split}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(bert, topics_csv, tmp_path_factory, _no_plots):
    """Two methods with two seeds each, and a plot."""
    out = tmp_path_factory.mktemp("compared")
    recipe = peftkit.Recipe.parse(
        {
            "name": "topics",
            "model": {"source": str(bert), "dtype": "float32"},
            "data": {"source": str(topics_csv), "max_length": 32},
            "method": {"kind": "lora", "rank": 4},
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "threads": 1},
            "export": {"prove": False},
            "tracking": [],
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "plots_of", _no_plots[experiment])
        return peftkit.compare(recipe, methods=["lora", "frozen"], seeds=2, out=out, isolated=False, quiet=True)


def test_the_table_holds_the_runs_own_figures(compared):
    table = compared.table
    assert [row["variant"] for row in table["variants"]] == ["lora", "frozen"]
    assert [row["variant"] for row in table["baselines"]] == ["majority", "zero shot"]
    for row in table["variants"]:
        metrics = [json.loads((Path(run) / "metrics.json").read_text()) for run in row["runs"]]
        values = [one["test"]["accuracy"] for one in metrics]
        assert row["value"] == pytest.approx(sum(values) / 2)
        assert row["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert row["low"] <= row["value"] <= row["high"]
        assert row["trained_parameters"] == metrics[0]["training"]["trained_parameters"]
        assert row["saved_bytes"] == (Path(row["runs"][0]) / "adapter" / "adapter_model.safetensors").stat().st_size
    assert compared["lora"]["trained_parameters"] > compared["frozen"]["trained_parameters"]


def test_every_variant_answers_the_same_rows_and_swapped_methods_learn_at_their_own_rate(compared):
    places = [[(row["file"], row["line"], row["gold"]) for row in lines(run)]
              for row in compared.table["variants"] for run in row["runs"]]  # fmt: skip
    assert all(one == places[0] for one in places)
    recipes = [peftkit.Recipe.from_yaml(Path(compared[name]["runs"][0]) / "recipe.yaml") for name in ("lora", "frozen")]
    assert [recipe.training.learning_rate for recipe in recipes] == [1e-2, None]


def test_it_is_written_as_json_markdown_and_a_page_with_a_plot(compared):
    assert json.loads((compared.path / "compare.json").read_text())["pick"] == compared.pick
    markdown = (compared.path / "compare.md").read_text()
    assert compared.pick in markdown.replace("\\", "")
    page = (compared.path / "compare.html").read_text()
    assert "data:image/png;base64," in page
    assert "<script" not in page
    assert "zero shot" in compared._repr_html_()
    assert (compared.path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_compared_by_mcnemars_test(compared):
    first, second = compared["lora"]["runs"][0], compared["frozen"]["runs"][0]
    found = peftkit.compare([first, second])
    rows = found.table["variants"]
    right = [[row["gold"] == row["predicted"] for row in lines(run)] for run in (first, second)]
    only = [sum(a and not b for a, b in zip(*pair)) for pair in (right, right[::-1])]
    other = next(row for row in rows if row["variant"] != found.table["best"])
    assert other["p_value"] == pytest.approx(binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0)
    both = peftkit.compare([*compared["lora"]["runs"], second]).table["variants"]
    assert [len(row["runs"]) for row in both] == [2, 1], "runs that differ in the seed alone are one variant"


def test_the_cheapest_that_is_not_significantly_worse_is_picked(compared):
    best = compared.table["best"]
    other = next(row for row in compared.table["variants"] if row["variant"] != best)
    close = other["p_value"] >= 0.05
    cheaper = other["trained_parameters"] < compared[best]["trained_parameters"]
    assert compared.pick.startswith(f"Pick {other['variant'] if close and cheaper else best} ")


def test_called_again_it_trains_only_what_is_missing(quick, tmp_path, monkeypatch):
    trained, real = [], InProcessRunner.run

    def counted(self, job, on_validation=None):
        trained.append(job.folder.parent.name)
        return real(self, job, on_validation)

    monkeypatch.setattr(InProcessRunner, "run", counted)
    here(quick, tmp_path / "out", methods=["frozen"])
    again = here(quick, tmp_path / "out", methods=["frozen"], vary={"training.batch_size": [8, 16]})
    assert trained == ["frozen", "frozen_batch_size=8", "frozen_batch_size=16"]
    assert here(quick, tmp_path / "out", methods=["frozen"], vary=["training.batch_size=8,16"]).table == again.table
    assert len(trained) == 3
    with pytest.raises(RunError, match=r"another recipe \(training.epochs 1.0 → 2.0\)"):
        here(quick, tmp_path / "out", methods=["frozen"], changes=["training.epochs=2"])


def test_a_variant_that_fails_is_a_row_that_says_so_and_the_rest_go_on(quick, tmp_path, monkeypatch):
    from peftkit.training.step import Stepper

    real = Stepper.run

    def run(self, batch, step):
        if self.recipe.method.kind == "full":
            raise MemoryError("no room")
        return real(self, batch, step)

    monkeypatch.setattr(Stepper, "run", run)
    found = here(quick, tmp_path / "out", methods=["full", "frozen"])
    assert found["full"]["status"] == "failed"
    assert "no room" in found["full"]["said"][0]
    assert found["frozen"]["status"] == "done"
    assert "no room" in (tmp_path / "out" / "compare.md").read_text()
    monkeypatch.setattr(Stepper, "run", real)
    assert here(quick, tmp_path / "out", methods=["full", "frozen"])["full"]["status"] == "done"


def test_ctrl_c_leaves_what_is_done_and_the_same_call_goes_on(quick, tmp_path, monkeypatch):
    real = InProcessRunner.run

    def once(self, job, on_validation=None):
        if job.recipe.method.kind == "frozen":
            raise KeyboardInterrupt
        return real(self, job, on_validation)

    with monkeypatch.context() as patch:
        patch.setattr(InProcessRunner, "run", once)
        with pytest.raises(Interrupted, match="repeat the command to resume") as stopped:
            here(quick, tmp_path / "out", methods=["lora", "frozen"])
    assert stopped.value.exit_code == 130
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["variants"]
    assert [row["status"] for row in rows] == ["done", "stopped"]
    assert [row["status"] for row in here(quick, tmp_path / "out", methods=["lora", "frozen"]).table["variants"]] == [
        "done", "done"]  # fmt: skip


def test_several_at_a_time_give_the_same_table(quick, tmp_path, monkeypatch):
    """The processes' place is taken by a stand-in; the threads are real."""
    started = []

    def run(self, job, on_validation=None):
        started.append(job.folder)
        on_validation(3, {"accuracy": 0.5})
        return Outcome("failed", message="stand-in")

    monkeypatch.setattr(jobs.SubprocessRunner, "run", run)
    found = peftkit.compare(quick, vary=["method.rank=2,4,8"], jobs=3, out=tmp_path / "out", quiet=True)
    assert len(started) == 3
    assert [row["said"] for row in found.table["variants"]] == [["stand-in"]] * 3
    assert found.pick == "No variant has finished."


def test_language_models_are_compared_by_their_loss_row_by_row(llama, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"say {n % 5} and {n}", "input": "", "output": f"it is {n % 5}"} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = peftkit.Recipe.parse(
        {
            "name": "answers", "model": {"source": str(llama), "dtype": "float32"}, "task": "instruction",
            "data": {"source": str(file), "max_length": 64}, "tracking": [], "export": {"prove": False},
            "training": {"epochs": 3, "batch_size": 8, "learning_rate": 2e-2, "threads": 1},
            "evaluation": {"generation": {"samples": 0}},
        }
    )  # fmt: skip
    found = here(recipe, tmp_path / "out", vary=["method.rank=1,8"])
    assert [row["said"] for row in found.table["variants"]] == [[], []]
    assert (found.table["metric"], found.table["greater_is_better"]) == ("loss", False)
    rank = {row["variant"]: row for row in found.table["variants"]}
    other = next(row for row in rank.values() if row["variant"] != found.table["best"])
    assert other["test"] == "paired bootstrap"
    assert other["difference"] == pytest.approx(other["value"] - rank[found.table["best"]]["value"], abs=1e-5)
    assert other["difference"] > 0
    assert found["zero shot"]["p_value"] < 0.01


def test_class_weights_leave_the_rows_the_same(quick):
    weighted = replace(quick, task={"class_weights": "balanced"})
    plain, other = prepare(quick), prepare(weighted)
    assert other.info.class_weights
    assert (plain.rows_fingerprint == other.rows_fingerprint, plain.fingerprint == other.fingerprint) == (True, False)
    fewer = prepare(replace(quick, data={"limit": 30}))
    assert fewer.rows_fingerprint != plain.rows_fingerprint


def test_variants_that_would_not_see_the_same_rows_are_refused(quick, compared, tmp_path):
    with pytest.raises(RecipeError, match=r"other rows than .*data.test_size 0.2 → 0.4"):
        here(quick, tmp_path / "out", vary=["data.test_size=0.2,0.4"])
    assert not (tmp_path / "out").exists()
    alone = peftkit.train(replace(quick, data={"limit": 30}), quiet=True)
    with pytest.raises(RunError, match="was trained on other rows"):
        peftkit.compare([compared["lora"]["runs"][0], alone.path])
    (alone.path / "about.json").unlink()
    with pytest.raises(RunError, match="fingerprint of its data"):
        peftkit.compare([alone.path])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ["loar"]}, "did you mean 'lora'"),
        ({"methods": ["lora", "lora"]}, "two variants have the label 'lora'"),
        ({"vary": ["method.rnak=4,8"]}, "did you mean 'rank'"),
        ({"vary": ["method.rank"]}, "expected part.field=value,value"),
        ({"vary": ["method.rank=4,-1"]}, "method.rank"),
        ({"seeds": 0}, "expected 1 or more"),
        ({"against": "frozn", "methods": ["lora", "frozen"]}, "did you mean 'frozen'"),
        ({"cost": "tme"}, "did you mean 'time'"),
    ],
    ids=str,
)
def test_a_wrong_word_is_one_message_before_anything_is_trained(quick, tmp_path, options, said):
    with pytest.raises(RecipeError, match=said):
        here(quick, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_field_is_varied_only_for_methods_that_have_it(quick):
    made = variants([quick], methods=["lora", "frozen"], vary=parse_vary(["method.rank=2,8", "training.epochs=1"]))
    assert [one.label for one in made] == ["lora rank=2 epochs=1", "lora rank=8 epochs=1", "frozen epochs=1"]
    assert made[1].recipe.method.rank == 8
    kept = variants([quick], methods=["full"], vary={}, changes=["training.learning_rate=0.5"])
    assert kept[0].recipe.training.learning_rate == 0.5


@pytest.mark.slow
def test_a_real_process_that_is_killed_goes_on_from_its_checkpoint(small_recipe, tmp_path):
    """The only test that starts processes: the death of the parent stops the worker, and the same call goes on."""
    recipe = replace(small_recipe, training={"epochs": 60, "save_every": 50, "evaluate_every": 50})
    (tmp_path / "long.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    out = tmp_path / "out"
    code = "import sys, peftkit; peftkit.compare(sys.argv[1], out=sys.argv[2])"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "long.yaml"), str(out)], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/seed-0/*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    outcome = out / "runs" / "small" / "seed-0" / "outcome.json"
    while not outcome.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert json.loads(outcome.read_text())["status"] == "stopped", "the worker outlived its parent and kept its work"
    run = next(out.glob("runs/*/seed-0/small-*"))
    before = len((run / "metrics.jsonl").read_text().splitlines())
    short = replace(recipe, name="small")
    found = peftkit.compare(short, out=out, isolated=False, quiet=True)
    assert found["small"]["status"] == "done"
    assert found["small"]["runs"] == [str(run)], "the same run went on"
    assert len((run / "metrics.jsonl").read_text().splitlines()) > before
