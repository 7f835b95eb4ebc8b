"""``peftkit tune``: hyperparameter search scored on validation alone; the best is tested once, at the end."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from peftkit.errors import Interrupted, PeftkitError, RecipeError, RunError, UserError, did_you_mean
from peftkit.evaluation.direction import greater_is_better
from peftkit.experiments import jobs as experiment_jobs
from peftkit.experiments import search
from peftkit.experiments.jobs import DONE, FAILED, PRUNED, InProcessRunner, Job, Outcome, Runner, SubprocessRunner
from peftkit.experiments.space import Space, parse
from peftkit.reporting import experiment
from peftkit.reporting import search as reporting
from peftkit.run import Run
from peftkit.runs import folder as folders
from peftkit.runs.choices import asked_recipe
from peftkit.schema import catalog, overrides
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe, replace
from peftkit.system import files

BEST, STUDY = "best.yaml", "study.json"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Study:
    """A finished search; a notebook displays it as a table."""

    table: Mapping[str, Any]
    """The content of tune.json: ``trials``, ``best``, ``importances``, ``test`` and more."""
    path: Path
    """Folder of tune.json, tune.html, best.yaml, the journal and the trials."""
    recipe: Recipe
    """The recipe with the best values, as in best.yaml."""
    run: Run
    """The best trial's run, finished, tested and exported."""

    @property
    def values(self) -> dict[str, Any]:
        """The best values by field."""
        return dict(self.table["best"]["values"])

    def _repr_html_(self) -> str:
        return experiment.render(reporting.page(self.table), standalone=False)


def tune(
    recipe: Recipe | str | Path,
    space: Mapping[str, Any] | Sequence[str],
    *,
    sampler: str = "bayesian",
    trials: int = 20,
    timeout: str | float | None = None,
    pruner: str | None = None,
    metric: str | None = None,
    rows: int | None = None,
    changes: Sequence[str] = (),
    out: str | Path | None = None,
    seed: int = 0,
    isolated: bool = True,
    quiet: bool = False,
) -> Study:
    """Searches, then finishes the best trial; only its test metrics are ever computed.

    Called again with the same folder, it resumes or adds trials.

    Args:
        recipe: an object, a name or a file.
        space: fields and their ranges or choices; see ``experiments.space``.
        sampler: grid, random or bayesian.
        trials: total number, including earlier calls; a grid ends when it is exhausted.
        timeout: start no trial after this time: minutes, or a text such as "90s", "30m", "2h".
        pruner: stops poor trials at a validation: median or halving; None lets all finish.
        metric: the validation metric to optimize; None for the recipe's training.best_metric or the task's own.
        rows: training rows per trial, for a cheap search; the best is then retrained on all rows.
        changes: overrides of the recipe, such as ``training.epochs=1``.
        out: the folder; None for ``tune-NAME`` in the recipe's output_dir.
        seed: seed of the sampler.
        isolated: run every trial in its own process; False starts sooner, but memory accumulates.
        quiet: print no progress.

    Raises:
        RecipeError: a wrong field, value or name, before the first trial.
        RunError: the folder is in use or contains a different study.
        PeftkitError: no trial finished.
        Interrupted: Ctrl-C; the same call resumes.
    """
    base = recipe if isinstance(recipe, Recipe) else catalog.get_recipe(str(recipe))
    base = overrides.apply(base, changes)
    if metric is not None:
        base = replace(base, training={"best_metric": metric})
    dimensions = parse(space, base)
    search.check_names(sampler, pruner, dimensions)
    seconds = _seconds(timeout)
    if trials < 1 or (rows is not None and rows < 1):
        raise RecipeError("--trials and --rows: expected 1 or more")
    objective = _objective(base)
    folder = Path(out) if out else Path(base.output_dir) / f"tune-{base.name}"
    with experiment_jobs.in_use(folder):
        _check_same_study(folder, base, dimensions, rows)
        study = search.open_study(
            folder, dimensions, sampler=sampler, pruner=pruner, maximize=greater_is_better(objective), seed=seed
        )
        runner: Runner = SubprocessRunner() if isolated else InProcessRunner()
        study_runner = StudyRunner(folder, base, dimensions, objective, rows, study, runner, pruner, quiet)
        try:
            study_runner.run(trials, seconds)
            return study_runner.finish()
        except KeyboardInterrupt:
            table = study_runner.table()
            experiment.write(folder, "tune", table, reporting.page(table))
            count = len(search.finished_trials(study))
            message = f"stopped; {count} trials are in {folder}; run the same command again to resume"
            raise Interrupted(message, signal.SIGINT) from None


@dataclass
class StudyRunner:
    """Runs the trials of a study."""

    folder: Path
    recipe: Recipe
    space: Space
    metric: str
    rows: int | None
    study: optuna.Study
    runner: Runner
    pruner: str | None
    quiet: bool

    def run(self, trials: int, seconds: float | None) -> None:
        """Runs trials until there are enough, time is up, or the grid is exhausted."""
        deadline = time.monotonic() + seconds if seconds else math.inf
        while len(search.finished_trials(self.study)) < trials and not search.exhausted(self.study):
            if time.monotonic() >= deadline:
                self._report("time limit reached; no further trials")
                return
            self._trial(self.study.ask())
            self._sweep()

    def finish(self) -> Study:
        """Finishes the best trial's run, or retrains it on all rows, and writes the results."""
        best = self._best()
        if best is None:
            raise PeftkitError(f"no trial finished; see {self.folder / 'trials'}")
        values = search.decided(best, self.space)
        recipe = search.with_swaps(self.recipe, values, self.space)
        (self.folder / BEST).write_text(recipe.to_yaml(), encoding="utf-8")
        folder = self.folder / "best" if self.rows else self._folder(best)
        job = Job(folder, recipe, keep=not self.rows)
        run = _finished(job)
        if run is None:
            self._report(f"finishing trial {best.number}: {_shown(values)}")
            outcome = self.runner.run(job)
            if outcome.status != DONE:
                raise PeftkitError(f"the best trial could not be finished: {outcome.message}")
            run = Path(str(outcome.run))
        table = self.table(run)
        experiment.write(self.folder, "tune", table, reporting.page(table))
        return Study(table, self.folder, recipe, Run(run, Recipe.from_yaml(run / folders.RECIPE)))

    def table(self, run: Path | None = None) -> dict[str, Any]:
        """The study as JSON values; ``test`` is None until the best run is finished."""
        best, metrics = self._best(), json.loads((run / folders.METRICS).read_text()) if run else {}
        return {
            "name": self.recipe.name,
            "metric": self.metric,
            "greater_is_better": greater_is_better(self.metric),
            "trials": [_trial_row(trial, self.space) for trial in search.finished_trials(self.study)],
            "best": _trial_row(best, self.space) if best else None,
            "importances": search.importances(self.study),
            "rows": self.rows,
            "run": str(run) if run else None,
            "test": metrics.get("test"),
        }

    def _trial(self, trial: Trial) -> None:
        values = search.values_of(trial, self.space, self.recipe)
        earlier = search.same_values(self.study, trial)
        if earlier is not None:
            trial.set_user_attr(search.FOLDER, search.folder_number(earlier))
            self.study.tell(trial, earlier.value)
            return self._report(f"trial {trial.number}: {_shown(values)}: same as trial {earlier.number}")
        self._report(f"trial {trial.number}: {_shown(values)}")
        outcome = self._run(trial, values)
        trial.set_user_attr("seconds", outcome.seconds)
        value = _best_value(outcome) if outcome.status == DONE else None
        if value is not None:
            self.study.tell(trial, value)
            return self._report(f"trial {trial.number}: {self.metric} {value:.4f} after {outcome.seconds:.0f} s")
        if outcome.status == PRUNED:
            self.study.tell(trial, state=TrialState.PRUNED)
            return self._report(f"trial {trial.number}: pruned after {outcome.seconds:.0f} s")
        message = outcome.message or f"{self.metric} was not finite"
        trial.set_user_attr("said", message)
        self.study.tell(trial, state=TrialState.FAIL)
        self._report(f"trial {trial.number}: failed: {message}")
        if outcome.user_error and self._best() is None:
            raise UserError(message)
        return None

    def _run(self, trial: Trial, values: Mapping[str, Any]) -> Outcome:
        seen = len(self.study.trials[trial.number].intermediate_values)

        def on_validation(step: int, metrics: Mapping[str, float]) -> bool:
            nonlocal seen
            if self.metric not in metrics:
                return True  # the run itself raises the error
            seen += 1
            if math.isfinite(metrics[self.metric]):
                trial.report(metrics[self.metric], step=seen)
            return not (self.pruner and trial.should_prune())

        recipe = replace(search.with_swaps(self.recipe, values, self.space), tracking=())
        if self.rows:
            recipe = replace(recipe, data={"limit": _limited(recipe.data.limit, self.rows)})
        return self.runner.run(Job(self._folder(trial), recipe, final=False, keep=True), on_validation)

    def _best(self) -> FrozenTrial | None:
        return self.study.best_trial if search.complete_trials(self.study) else None

    def _folder(self, trial: Trial | FrozenTrial) -> Path:
        return self.folder / "trials" / f"{search.folder_number(trial):03d}"

    def _sweep(self) -> None:
        """Removes the checkpoints of all trials but the best."""
        best = self._best()
        for trial in search.finished_trials(self.study):
            if best is None or self._folder(trial) != self._folder(best):
                for checkpoints in self._folder(trial).glob("*/checkpoints"):
                    shutil.rmtree(checkpoints, ignore_errors=True)

    def _report(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _objective(recipe: Recipe) -> str:
    """The validation metric; prepares the data, since labels decide the default and wrong data must fail here."""
    from peftkit.data.pipeline import prepare

    head = head_of(prepare(recipe).info, recipe.task)
    name, known = recipe.training.best_metric or head.best_metric, head.metric_names(recipe.evaluation)
    if name not in known:
        raise RecipeError(f"--metric: unknown metric '{name}': {did_you_mean(name, known)}")
    return name


def _limited(limit: Any, rows: int) -> dict[str, int]:
    """The recipe's row limits with the training rows of a trial."""
    if not isinstance(limit, Mapping):
        limit = dict.fromkeys(("train", "validation", "test"), limit) if limit else {}
    return {**limit, "train": min(rows, limit.get("train", rows))}


def _best_value(outcome: Outcome) -> float | None:
    """The validation metric of the run's best checkpoint."""
    value = json.loads((Path(str(outcome.run)) / folders.METRICS).read_text())["training"]["best_value"]
    return float(value) if value is not None and math.isfinite(value) else None


def _finished(job: Job) -> Path | None:
    """The run in the job's folder, if an earlier call finished it with this recipe."""
    done = experiment_jobs.earlier(job)
    run = Path(done.run) if done and done.run and done.status != FAILED else None
    if run is None or not (run / "report.html").is_file():
        return None
    return run if experiment_jobs.same_recipe(asked_recipe(run), job.recipe) else None


def _check_same_study(folder: Path, recipe: Recipe, space: Space, rows: int | None) -> None:
    """Stores what the study searches; raises RunError if the folder contains a different study."""
    searched = {path: str(one) for path, one in space.items()}
    mine = json.loads(json.dumps({"recipe": experiment_jobs.learned(recipe), "space": searched, "rows": rows}))
    file = folder / STUDY
    if not file.is_file():
        return files.write_json(file, mine)
    stored = json.loads(file.read_text(encoding="utf-8"))
    for part in mine:
        if stored.get(part) != mine[part]:
            raise RunError(f"{folder} contains a study with a different {part}; choose another folder with --out")
    return None


def _trial_row(trial: FrozenTrial, space: Space) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "value": trial.value if trial.state == TrialState.COMPLETE else None,
        "values": search.decided(trial, space),
        "validations": list(trial.intermediate_values.values()),
        "seconds": trial.user_attrs.get("seconds"),
        "said": trial.user_attrs.get("said", ""),
    }


def _seconds(timeout: str | float | None) -> float | None:
    """``"30m"`` → 1800; a plain number is minutes; raises RecipeError."""
    if timeout is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", str(timeout).strip())
    if match is None or float(match[1]) <= 0:
        raise RecipeError(f"--timeout {timeout}: expected a time such as 90s, 30m or 2h")
    return float(match[1]) * UNITS[match[2] or "m"]


def _shown(values: Mapping[str, Any]) -> str:
    shown = {path: f"{value:.3g}" if isinstance(value, float) else value for path, value in values.items()}
    return ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in shown.items())
