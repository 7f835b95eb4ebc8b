"""Searches on tiny models: every sampler, pruning, going on, and a test split that nothing of it reads."""

from __future__ import annotations

import csv
import json

import optuna
import pytest

import peftkit
from peftkit import replace
from peftkit.errors import Interrupted, RecipeError, RunError
from peftkit.experiments import search
from peftkit.experiments.jobs import InProcessRunner, Outcome
from peftkit.experiments.space import Choices, Range, parse
from peftkit.training.loop import Loop
from tests.conftest import topic_rows

RATES = "training.learning_rate=1e-4..1e-1:log"


@pytest.fixture
def quick(small_recipe):
    """Two epochs of a frozen base."""
    return replace(small_recipe, method={"kind": "frozen"}, training={"epochs": 2})


@pytest.fixture
def stand_in(monkeypatch):
    """Trials that cost nothing: the figure is a known function of the learning rate, best at 0.01."""
    from peftkit.experiments import tune as module

    seen = []

    def run(self, job, on_validation=None):
        rate = job.recipe.training.learning_rate
        seen.append((job.folder.name, job.recipe, job.final))
        value = 1.0 / (1 + abs(rate - 0.01) * 100)
        for step in (1, 2, 3):
            if not on_validation(step, {"accuracy": value * step / 3}):
                return Outcome("pruned")
        (job.folder / "metrics.json").parent.mkdir(parents=True, exist_ok=True)
        (job.folder / "metrics.json").write_text(json.dumps({"training": {"best_value": value}}))
        return Outcome("done", run=str(job.folder))

    monkeypatch.setattr(InProcessRunner, "run", run)
    monkeypatch.setattr(module.StudyRunner, "finish", lambda self: self.table())
    return seen


def here(recipe, space, out, **options):
    return peftkit.tune(recipe, space, out=out, isolated=False, quiet=True, **options)


@pytest.mark.parametrize("sampler", ["random", "bayesian"])
def test_ranges_are_sampled_within_their_ends_and_a_new_call_draws_new_values(quick, tmp_path, stand_in, sampler):
    space = [RATES, "training.batch_size=8..32:step=8", "training.epochs=1..4"]
    here(quick, space, tmp_path / "out", sampler=sampler, trials=6)
    table = here(quick, space, tmp_path / "out", sampler=sampler, trials=12)
    assert len(stand_in) == len(table["trials"]) == 12, "six earlier ones count"
    rates = [recipe.training.learning_rate for _, recipe, _ in stand_in]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert len(set(rates)) == 12
    assert {recipe.training.batch_size for _, recipe, _ in stand_in} <= {8, 16, 24, 32}
    assert {recipe.training.epochs for _, recipe, _ in stand_in} <= {1, 2, 3, 4}
    best = max(stand_in, key=lambda one: -abs(one[1].training.learning_rate - 0.01))
    assert table["best"]["values"]["training.learning_rate"] == best[1].training.learning_rate
    assert set(table["importances"]) <= {path.partition("=")[0] for path in space}
    assert max(table["importances"], key=table["importances"].get) == "training.learning_rate"


def test_the_bayesian_sampler_is_optunas_tpe_and_narrows_down(quick, tmp_path, stand_in):
    here(quick, [RATES], tmp_path / "out", sampler="bayesian", trials=30, seed=1)
    distances = [abs(recipe.training.learning_rate - 0.01) for _, recipe, _ in stand_in]
    assert sorted(distances[-10:])[5] < sorted(distances[:10])[5], "the median of the last ten is nearer the best"


def test_a_grid_is_searched_whole_and_once(quick, tmp_path, stand_in):
    space = {"training.learning_rate": [0.1, 0.01, 0.001], "training.batch_size": [8, 16]}
    table = here(quick, space, tmp_path / "out", sampler="grid", trials=50)
    tried = {(recipe.training.learning_rate, recipe.training.batch_size) for _, recipe, _ in stand_in}
    assert len(tried) == len(stand_in) == len(table["trials"]) == 6
    assert table["best"]["values"]["training.learning_rate"] == 0.01
    here(quick, space, tmp_path / "out", sampler="grid", trials=50)
    assert len(stand_in) == 6


def test_a_stopped_study_goes_on_with_the_trial_that_was_running(quick, tmp_path, stand_in, monkeypatch):
    space = {"training.learning_rate": [0.1, 0.01, 0.001]}
    real = InProcessRunner.run

    def stopped(self, job, on_validation=None):
        if len(stand_in) == 1:
            stand_in.append((job.folder.name, job.recipe, job.final))
            raise KeyboardInterrupt
        return real(self, job, on_validation)

    with monkeypatch.context() as patch:
        patch.setattr(InProcessRunner, "run", stopped)
        with pytest.raises(Interrupted, match="1 trials are in"):
            here(quick, space, tmp_path / "out", sampler="grid", trials=3)
    table = here(quick, space, tmp_path / "out", sampler="grid", trials=3)
    names = [name for name, _, _ in stand_in]
    assert names == ["000", "001", "001", names[3]], "the second goes on in its own folder"
    assert stand_in[1][1] == stand_in[2][1]
    assert sorted(trial["values"]["training.learning_rate"] for trial in table["trials"]) == [0.001, 0.01, 0.1]


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_poor_trials_are_ended_at_a_validation(quick, tmp_path, stand_in, pruner):
    space = {"training.learning_rate": [0.01, 0.0101, 0.0099, 0.0102, 0.09, 0.1]}
    out = tmp_path / "out"
    table = here(quick, space, out, sampler="grid", trials=6, pruner=pruner)
    cut = {trial["values"]["training.learning_rate"]: trial for trial in table["trials"] if trial["state"] == "pruned"}
    assert cut
    assert 0.01 not in cut
    assert all(len(trial["validations"]) < 3 for trial in cut.values())
    whole = here(quick, space, tmp_path / "whole", sampler="grid", trials=6)
    assert {trial["state"] for trial in whole["trials"]} == {"complete"}


def test_equal_values_are_trained_once_and_time_runs_out(quick, tmp_path, stand_in):
    table = here(quick, ["training.learning_rate=0.1,0.01"], tmp_path / "out", sampler="random", trials=8)
    assert len(table["trials"]) == 8
    assert len(stand_in) == 2
    late = here(quick, [RATES], tmp_path / "late", sampler="random", trials=8, timeout="0.000001s")
    assert late["trials"] == []


def test_a_method_and_its_own_fields(quick, tmp_path, stand_in):
    space = {"method.kind": ["lora", "frozen"], "method.rank": [2, 4], "training.learning_rate": [0.1, 0.01]}
    here(quick, space, tmp_path / "out", sampler="random", trials=12)
    ranks = {getattr(recipe.method, "rank", None) for _, recipe, _ in stand_in if recipe.method.kind == "lora"}
    assert ranks <= {2, 4}
    assert {recipe.method.kind for _, recipe, _ in stand_in} == {"lora", "frozen"}


@pytest.fixture
def split_files(tmp_path):
    """Files of train, validation and test rows."""

    def make(name, shift):
        folder = tmp_path / name
        folder.mkdir()
        rows = topic_rows(90)
        labels = ["sports", "business", "science"]
        for split, part in (("train", rows[:60]), ("validation", rows[60:75]), ("test", rows[75:])):
            if split == "test":
                part = [(text, labels[(labels.index(label) + shift) % 3]) for text, label in part]
            with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("text", "label"), *part])
        return str(folder)

    return make


def test_real_trials_never_read_the_test_split_and_the_best_is_tested_once(quick, split_files, tmp_path, monkeypatch):
    seen, real = [], Loop.evaluate

    def evaluate(self, split):
        seen.append(next((name for name, held in self.data.splits.items() if held is split), "probe"))
        return real(self, split)

    monkeypatch.setattr(Loop, "evaluate", evaluate)
    found = {}
    for name, shift in (("right", 0), ("wrong", 1)):
        recipe = replace(quick, data={"source": split_files(name, shift)})
        seen.clear()
        found[name] = here(recipe, {"training.learning_rate": [1e-4, 1e-1]}, tmp_path / f"out_{name}", sampler="grid")
        assert seen.count("test") == 1
        assert seen[-1] == "test", "after the last trial"
    right, wrong = (found[name].table["trials"] for name in ("right", "wrong"))
    assert [(trial["values"], trial["value"]) for trial in right] == [
        (trial["values"], trial["value"]) for trial in wrong
    ]
    tests = [found[name].run.metrics["test"]["loss"] for name in ("right", "wrong")]
    assert tests[0] != tests[1], "the labels that were changed do matter to the test"
    plain = peftkit.train(found["right"].recipe, quiet=True)
    assert plain.metrics["test"] == found["right"].run.metrics["test"], "a finished trial is the run that train makes"
    assert (found["right"].run.path / "adapter").is_dir()
    best = found["right"].table["best"]["number"]
    kept = {path.parent.parent.name for path in (tmp_path / "out_right" / "trials").glob("*/*/checkpoints")}
    assert kept == {f"{best:03d}"}, "the others' checkpoints are swept"


@pytest.mark.slow
def test_a_failing_trial_is_told_and_the_best_of_cheap_trials_is_trained_on_all_rows(quick, tmp_path, monkeypatch):
    from peftkit.training.step import Stepper

    real = Stepper.run

    def run(self, batch, step):
        if self.recipe.training.batch_size == 16:
            raise MemoryError("no room")
        return real(self, batch, step)

    monkeypatch.setattr(Stepper, "run", run)
    found = here(quick, {"training.batch_size": [8, 16]}, tmp_path / "out", sampler="grid", rows=24)
    states = {trial["values"]["training.batch_size"]: trial for trial in found.table["trials"]}
    assert states[16]["state"] == "fail"
    assert "no room" in states[16]["said"]
    trial = json.loads(next((tmp_path / "out" / "trials").glob("*/small-*/metrics.json")).read_text())
    assert "test" not in trial
    assert trial["training"]["rows"] == 48, "24 rows twice"
    assert found.run.metrics["training"]["rows"] > 48
    assert peftkit.Recipe.from_yaml(tmp_path / "out" / "best.yaml").training.batch_size == 8
    assert "no room" in (tmp_path / "out" / "tune.html").read_text()
    with pytest.raises(RunError, match="a study with a different rows"):
        here(quick, {"training.batch_size": [8, 16]}, tmp_path / "out", sampler="grid")


@pytest.mark.parametrize(
    ("space", "options", "said"),
    [
        (["training.learning_rte=1e-5..1e-2"], {}, "did you mean 'learning_rate'"),
        (["training.learning_rate=1e-5..-1"], {}, "smaller number first"),
        (["training.learning_rate=0..1:log"], {}, "starts above 0"),
        (["training.learning_rate=-1.0..1.0"], {}, "greater than 0"),
        (["training.learning_rate=a..b"], {}, "'a' is not a number"),
        (["training.learning_rate=1e-5..1e-2:lgo"], {}, "did you mean 'log'"),
        (["training.batch_size=1.0..8.0"], {}, "write 4..16 for integers"),
        (["training.batch_size=8,0"], {}, "greater than or equal to 1"),
        (["training.scheduler=linear,cosin"], {}, "cosine"),
        (["training.batch_size=8"], {}, "two values or more"),
        (["training.batch_size"], {}, "expected part.field=SPEC"),
        (["data.test_size=0.1,0.2"], {}, "scored on other rows"),
        (["training.seed=1..5"], {}, "chance"),
        (["evaluation.confidence=0.9,0.95"], {}, "does not affect learning"),
        ([RATES, RATES], {}, "give it once"),
        ([RATES], {"sampler": "grid"}, "a grid has no end here"),
        ([RATES], {"sampler": "bayes"}, "did you mean 'bayesian'"),
        ([RATES], {"pruner": "medain"}, "did you mean 'median'"),
        ([RATES], {"metric": "acuracy"}, "did you mean 'accuracy'"),
        ([RATES], {"timeout": "soon"}, "expected a time"),
        ([RATES], {"trials": 0}, "expected 1 or more"),
        ([], {}, "expected at least one"),
    ],
    ids=str,
)
def test_a_wrong_space_is_one_message_before_the_first_trial(quick, tmp_path, space, options, said):
    with pytest.raises(RecipeError, match=said):
        here(quick, space, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_spaces_are_read_from_texts_files_and_mappings(small_recipe, tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("training.learning_rate: 1e-5..1e-2:log\nmethod.rank: [4, 8]\n", encoding="utf-8")
    wanted = {"training.learning_rate": Range(1e-5, 1e-2, log=True), "method.rank": Choices((4, 8))}
    assert parse([str(file)], small_recipe) == wanted
    assert parse(["training.learning_rate=1e-5..1e-2:log", "method.rank=4,8"], small_recipe) == wanted
    assert parse({"method.rank": [4, 8], "training.learning_rate": "1e-5..1e-2:log"}, small_recipe) == wanted
    assert parse(["training.warmup=0.0..0.5:step=0.25"], small_recipe)["training.warmup"].grid() == (0.0, 0.25, 0.5)
    assert parse(["training.epochs=1..3"], small_recipe)["training.epochs"].grid() == (1, 2, 3)


def test_the_samplers_and_pruners_are_optunas(tmp_path):
    made = {"sampler": {}, "pruner": {}}
    for number, (sampler, pruner) in enumerate((("random", "median"), ("bayesian", "halving"), ("grid", None))):
        (tmp_path / str(number)).mkdir()
        study = search.open_study(
            tmp_path / str(number),
            {"method.rank": Choices((1, 2))},
            sampler=sampler,
            pruner=pruner,
            maximize=True,
            seed=0,
        )
        made["sampler"][sampler], made["pruner"][pruner] = study.sampler, study.pruner
    assert isinstance(made["sampler"]["random"], optuna.samplers.RandomSampler)
    assert isinstance(made["sampler"]["bayesian"], optuna.samplers.TPESampler)
    assert isinstance(made["sampler"]["grid"], optuna.samplers.GridSampler)
    assert isinstance(made["pruner"]["median"], optuna.pruners.MedianPruner)
    assert isinstance(made["pruner"]["halving"], optuna.pruners.SuccessiveHalvingPruner)
