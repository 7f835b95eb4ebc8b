"""Runs that earlier versions left on a disk are loaded, scored, shown and gone on with; see tests/old_runs/make.py."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peftkit
from peftkit.models.kernels import attention, dropout

OLD = Path(__file__).with_name("old_runs")
ROUNDING = 1e-4
"""Between the weights of one training on two kinds of processors. The old runs were made on another machine, whose
sums are rounded otherwise, so that equal bytes cannot be asked for; what a lost state of the optimizer or of dropout
would change is a thousand times as much: other draws of dropout after the interruption move them by 0.1."""
VERSIONS = sorted(path.name for path in OLD.iterdir() if (path / "finished").is_dir())


@pytest.fixture(params=VERSIONS)
def old(request, tmp_path, monkeypatch):
    """A copy of a version's runs, as the working directory."""
    copy = tmp_path / "old"
    shutil.copytree(OLD / request.param, copy)
    monkeypatch.chdir(copy)
    return copy


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def weights(run):
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


def apart(one, other):
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def same_figures(found, stored):
    assert set(found) == set(stored)
    assert all(math.isclose(found[name], stored[name], rel_tol=1e-5, abs_tol=1e-6) for name in stored)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_old_classifier_predicts_what_it_predicted(old, split):
    stored = lines(f"finished/predictions/{split}.jsonl")
    rows = Path("topics.csv").read_text(encoding="utf-8").splitlines()
    texts = [rows[row["line"] - 1].rpartition(",")[0] for row in stored]
    found = peftkit.load("finished").predict(texts)
    assert [one.label for one in found] == [row["predicted"] for row in stored]
    likely = [max(one.probabilities.values()) for one in found]
    assert likely == pytest.approx([row["probability"] for row in stored], abs=1e-4)


@pytest.mark.parametrize("name", ["finished", "answers"])
def test_an_old_run_is_scored_as_it_was(old, name):
    for split in ("validation", "test"):
        same_figures(peftkit.evaluate(name, split=split), read(f"{name}/metrics.json")[split])


def test_an_old_language_model_writes_what_it_wrote(old):
    stored = read("answers/generated.json")
    assert peftkit.load("answers").generate(list(stored)) == list(stored.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU draws other dropout than the CPU that began the run")
def test_an_old_run_that_was_interrupted_goes_on_to_the_same_end(old, monkeypatch):
    """With torch's dropout masks in fp32, which 0.1.0 used; those of now would end 0.1 away."""
    for kernel in (attention, dropout):
        monkeypatch.setattr(kernel, "DTYPES", (torch.bfloat16,))
    begun = [row["step"] for row in lines("interrupted/metrics.jsonl")]
    run = peftkit.train(peftkit.Recipe.from_yaml("interrupted/recipe.yaml"), resume="interrupted", quiet=True)
    assert apart(weights(run.path), weights("finished")) < ROUNDING
    same_figures(run.metrics["test"], read("finished/metrics.json")["test"])
    steps = [row["step"] for row in lines("interrupted/metrics.jsonl")]
    assert steps == [row["step"] for row in lines("finished/metrics.jsonl")]
    assert steps[: len(begun)] == begun, "it did not begin anew"


def test_an_old_run_whose_recipe_has_changed_is_not_gone_on_with(old):
    recipe = peftkit.replace(peftkit.Recipe.from_yaml("interrupted/recipe.yaml"), training={"seed": 1})
    with pytest.raises(peftkit.UserError, match=r"these changed: training.seed \(0 → 1\)"):
        peftkit.train(recipe, resume="interrupted", quiet=True)


@pytest.mark.parametrize("name", ["finished", "answers"])
def test_an_old_run_is_shown(old, name):
    run = peftkit.Run(Path(name), peftkit.Recipe.from_yaml(f"{name}/recipe.yaml"))
    assert run.metrics == read(f"{name}/metrics.json")
    shown = run._repr_html_()
    loss = run.metrics["test"]["loss"]
    assert run.recipe.model.source in shown
    assert f"{loss:.4f}" in shown


def test_old_runs_are_set_side_by_side(old):
    shutil.copytree("finished", "again")
    compared = peftkit.compare(["finished", "again"], quiet=True)
    (row,) = compared.table["variants"]
    assert [Path(path).name for path in row["runs"]] == ["finished", "again"], "two runs of one recipe"
    assert "accuracy" in compared._repr_html_()
