"""``peftkit tune``: a search of hyperparameters, judged by validation alone; the best is tested once, at the end.

found = peftkit.tune("bbc_news_lora", ["training.learning_rate=1e-5..1e-2:log", "method.rank=4,8,16"], trials=20)
found.values, found.run.metrics["test"]
"""

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
from peftkit.experiments import jobs as working
from peftkit.experiments import search
from peftkit.experiments.jobs import DONE, FAILED, PRUNED, InProcessRunner, Job, Outcome, Runner, SubprocessRunner
from peftkit.experiments.space import Space, parse
from peftkit.reporting import search as reporting
from peftkit.run import Run
from peftkit.runs import folder as folders
from peftkit.schema import catalog, overrides
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe, replace

BEST, STUDY = "best.yaml", "study.json"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Study:
    """A search that ended; shows itself as a table in a notebook."""

    table: Mapping[str, Any]
    """What tune.json holds: ``trials``, ``best``, ``importances``, ``test`` and more."""
    path: Path
    """Folder of tune.json, tune.html, best.yaml, the journal and the trials."""
    recipe: Recipe
    """The recipe with the best values; best.yaml holds it."""
    run: Run
    """The best trial's run, finished, tested and exported."""

    @property
    def values(self) -> dict[str, Any]:
        """The best values by field."""
        return dict(self.table["best"]["values"])

    def _repr_html_(self) -> str:
        return reporting.fragment(self.table)


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
    """Searches, then finishes the best trial: its test figures are the only ones that are ever computed.

    Called again with the same folder it goes on: with more trials, or where it was stopped.

    Args:
        recipe: an object, a name or a file.
        space: fields with what they may be; see ``experiments.space``.
        sampler: grid, random or bayesian.
        trials: how many in all, those of earlier calls included; a grid ends earlier when it is searched whole.
        timeout: no trial starts after this long: minutes, or a text such as "90s", "30m", "2h".
        pruner: ends poor trials at a validation: median or halving; None lets all finish.
        metric: the validation figure that judges; None takes the recipe's training.best_metric or the task's own.
        rows: training rows of a trial, for a cheap search; the best is then trained anew on all rows.
        changes: overrides of the recipe, such as ``training.epochs=1``.
        out: the folder; None takes ``tune-NAME`` in the recipe's output_dir.
        seed: of the sampler.
        isolated: run every trial in a process of its own; False starts sooner, but memory adds up.
        quiet: say nothing while it goes on.

    Raises:
        RecipeError: a wrong field, value or name, before the first trial.
        RunError: the folder is in use, or holds a study of something else.
        PeftkitError: no trial finished.
        Interrupted: Ctrl-C; the same call goes on.
    """
    base = recipe if isinstance(recipe, Recipe) else catalog.get_recipe(str(recipe))
    base = overrides.apply(base, changes)
    if metric is not None:
        base = replace(base, training={"best_metric": metric})
    known = parse(space, base)
    search.check_names(sampler, pruner, known)
    seconds = _seconds(timeout)
    if trials < 1 or (rows is not None and rows < 1):
        raise RecipeError("--trials and --rows: expected 1 or more")
    judged = _judged_by(base)
    folder = Path(out) if out else Path(base.output_dir) / f"tune-{base.name}"
    with working.in_use(folder):
        _same_study(folder, base, known, rows)
        study = search.open_study(
            folder, known, sampler=sampler, pruner=pruner, maximize=greater_is_better(judged), seed=seed
        )
        runner: Runner = SubprocessRunner() if isolated else InProcessRunner()
        searching = StudyRunner(folder, base, known, judged, rows, study, runner, pruner, quiet)
        try:
            searching.run(trials, seconds)
            return searching.finish()
        except KeyboardInterrupt:
            reporting.write(searching.table(), folder)
            said = f"stopped; {len(search.counted(study))} trials are kept in {folder}, and the same command goes on"
            raise Interrupted(said, signal.SIGINT) from None


@dataclass
class StudyRunner:
    """A study under way."""

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
        """Runs trials until there are enough, time is up, or the grid is searched whole."""
        ends = time.monotonic() + seconds if seconds else math.inf
        while len(search.counted(self.study)) < trials and not search.exhausted(self.study):
            if time.monotonic() >= ends:
                self._say("the time is up: no further trial")
                return
            self._trial(self.study.ask())
            self._sweep()

    def finish(self) -> Study:
        """Finishes the best trial's run, or trains it anew on all rows, and writes what was found."""
        best = self._best()
        if best is None:
            raise PeftkitError(f"no trial finished; see {self.folder / 'trials'}")
        values = search.decided(best, self.space)
        recipe = search.with_swaps(self.recipe, values, self.space)
        (self.folder / BEST).write_text(recipe.to_yaml(), encoding="utf-8")
        place = self.folder / "best" if self.rows else self._place(best)
        job = Job(place, recipe, keep=not self.rows)
        run = _finished(job)
        if run is None:
            self._say(f"finishing trial {best.number}: {_shown(values)}")
            outcome = self.runner.run(job)
            if outcome.status != DONE:
                raise PeftkitError(f"the best trial could not be finished: {outcome.message}")
            run = Path(str(outcome.run))
        table = self.table(run)
        reporting.write(table, self.folder)
        return Study(table, self.folder, recipe, Run(run, Recipe.from_yaml(run / folders.RECIPE)))

    def table(self, run: Path | None = None) -> dict[str, Any]:
        """The study as JSON; ``test`` is there only when the best run is finished."""
        best, metrics = self._best(), json.loads((run / folders.METRICS).read_text()) if run else {}
        return {
            "name": self.recipe.name,
            "metric": self.metric,
            "greater_is_better": greater_is_better(self.metric),
            "trials": [_trial_row(trial, self.space) for trial in search.counted(self.study)],
            "best": _trial_row(best, self.space) if best else None,
            "importances": search.importances(self.study),
            "rows": self.rows,
            "run": str(run) if run else None,
            "test": metrics.get("test"),
        }

    def _trial(self, trial: Trial) -> None:
        values = search.values_of(trial, self.space, self.recipe)
        known = search.same_values(self.study, trial)
        if known is not None:
            trial.set_user_attr(search.FOLDER, search.folder_number(known))
            self.study.tell(trial, known.value)
            return self._say(f"trial {trial.number}: {_shown(values)}: as trial {known.number}")
        self._say(f"trial {trial.number}: {_shown(values)}")
        outcome = self._run(trial, values)
        trial.set_user_attr("seconds", outcome.seconds)
        value = _best_value(outcome) if outcome.status == DONE else None
        if value is not None:
            self.study.tell(trial, value)
            return self._say(f"trial {trial.number}: {self.metric} {value:.4f} after {outcome.seconds:.0f} s")
        if outcome.status == PRUNED:
            self.study.tell(trial, state=TrialState.PRUNED)
            return self._say(f"trial {trial.number}: pruned after {outcome.seconds:.0f} s")
        said = outcome.message or f"{self.metric} was not a number"
        trial.set_user_attr("said", said)
        self.study.tell(trial, state=TrialState.FAIL)
        self._say(f"trial {trial.number}: failed: {said}")
        if outcome.user_error and self._best() is None:
            raise UserError(said)
        return None

    def _run(self, trial: Trial, values: Mapping[str, Any]) -> Outcome:
        seen = len(self.study.trials[trial.number].intermediate_values)

        def on_validation(step: int, figures: Mapping[str, float]) -> bool:
            nonlocal seen
            if self.metric not in figures:
                return True  # the run itself says what is wrong
            seen += 1
            if math.isfinite(figures[self.metric]):
                trial.report(figures[self.metric], step=seen)
            return not (self.pruner and trial.should_prune())

        recipe = replace(search.with_swaps(self.recipe, values, self.space), tracking=())
        if self.rows:
            recipe = replace(recipe, data={"limit": _limited(recipe.data.limit, self.rows)})
        return self.runner.run(Job(self._place(trial), recipe, final=False, keep=True), on_validation)

    def _best(self) -> FrozenTrial | None:
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return self.study.best_trial if done else None

    def _place(self, trial: Trial | FrozenTrial) -> Path:
        return self.folder / "trials" / f"{search.folder_number(trial):03d}"

    def _sweep(self) -> None:
        """Only the best trial keeps its checkpoints."""
        best = self._best()
        for trial in search.counted(self.study):
            if best is None or self._place(trial) != self._place(best):
                for checkpoints in self._place(trial).glob("*/checkpoints"):
                    shutil.rmtree(checkpoints, ignore_errors=True)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _judged_by(recipe: Recipe) -> str:
    """The validation figure; reads the data, whose kind of label decides, so that wrong data end here as well."""
    from peftkit.data.pipeline import prepare

    head = head_of(prepare(recipe).info, recipe.task)
    name, known = recipe.training.best_metric or head.best_metric, head.metric_names(recipe.evaluation)
    if name not in known:
        raise RecipeError(f"--metric: no figure '{name}': {did_you_mean(name, known)}")
    return name


def _limited(limit: Any, rows: int) -> dict[str, int]:
    """The recipe's limits with the training rows of a trial."""
    old = dict(limit) if isinstance(limit, Mapping) else dict.fromkeys(("train", "validation", "test"), limit)
    known = {name: value for name, value in old.items() if value is not None}
    return {**known, "train": min(rows, known.get("train", rows))}


def _best_value(outcome: Outcome) -> float | None:
    """The validation figure of the checkpoint that the run chose."""
    value = json.loads((Path(str(outcome.run)) / folders.METRICS).read_text())["training"]["best_value"]
    return float(value) if value is not None and math.isfinite(value) else None


def _finished(job: Job) -> Path | None:
    """The run in the job's folder, if an earlier call tested and exported it with this recipe."""
    done = working.earlier(job)
    run = Path(done.run) if done and done.run and done.status != FAILED else None
    if run is None or not (run / "report.html").is_file():
        return None
    return run if working.same_recipe(Recipe.from_yaml(run / folders.RECIPE), job.recipe) else None


def _same_study(folder: Path, recipe: Recipe, space: Space, rows: int | None) -> None:
    """Notes what the study is of; raises RunError when the folder holds one of something else."""
    mine = {"recipe": working.learned(recipe), "space": {path: str(one) for path, one in space.items()}, "rows": rows}
    mine = json.loads(json.dumps(mine))
    file = folder / STUDY
    if not file.is_file():
        return folders.write_json(file, mine)
    held = json.loads(file.read_text(encoding="utf-8"))
    for part in mine:
        if held.get(part) != mine[part]:
            raise RunError(f"{folder} holds a study of another {part}; give this one a folder of its own: --out FOLDER")
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
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", str(timeout).strip())
    if found is None or float(found[1]) <= 0:
        raise RecipeError(f"--timeout {timeout}: expected a time such as 90s, 30m or 2h")
    return float(found[1]) * UNITS[found[2] or "m"]


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{path.rpartition('.')[2]} {value:.3g}" if isinstance(value, float) else f"{path.rpartition('.')[2]} {value}"
        for path, value in values.items()
    )
