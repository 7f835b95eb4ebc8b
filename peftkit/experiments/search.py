"""A study: Optuna chooses the values, validation alone scores them, and a journal on disk stores them.

Samplers: the whole grid; random (Bergstra & Bengio 2012, "Random search for hyper-parameter optimization"); Bayesian,
the tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for hyper-parameter optimization"). Pruners:
the median of earlier trials at the same validation, or asynchronous successive halving (Li et al. 2018,
arXiv:1810.05934).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from peftkit.errors import RecipeError, did_you_mean
from peftkit.experiments.space import Choices, Dimension, Space
from peftkit.experiments.variants import RATE, has_field, with_values
from peftkit.schema.recipe import Recipe

JOURNAL = "study.journal"
SAMPLERS = ("grid", "random", "bayesian")
PRUNERS = ("median", "halving")
FOLDER, SUPERSEDES = "folder", "supersedes"
"""User attributes of a trial that resumes a stopped one: its folder and its number."""


class Grid(GridSampler):
    """Optuna's grid sampler for ask-and-tell; the caller checks ``exhausted``, where Optuna would raise."""

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        """Does nothing: the caller checks whether the grid is exhausted."""


def open_study(
    folder: Path, space: Space, *, sampler: str, pruner: str | None, maximize: bool, seed: int
) -> optuna.Study:
    """The study in the folder, new or existing; stopped trials are queued again.

    Args:
        sampler, pruner, space: as ``check_names`` accepts them.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.create_study(
        storage=storage, study_name="tune", direction="maximize" if maximize else "minimize", load_if_exists=True
    )
    # the same seed would draw the values of earlier calls again
    study.sampler = _sampler(sampler, space, seed + len(study.trials))
    study.pruner = _pruner(pruner)
    _queue_stopped(study)
    return study


def check_names(sampler: str, pruner: str | None, space: Space) -> None:
    """Raises RecipeError for an unknown sampler or pruner, or a range that a grid cannot enumerate."""
    if sampler not in SAMPLERS:
        raise RecipeError(f"--sampler: unknown sampler '{sampler}': {did_you_mean(sampler, SAMPLERS)}")
    if pruner is not None and pruner not in PRUNERS:
        raise RecipeError(f"--pruner: unknown pruner '{pruner}': {did_you_mean(pruner, PRUNERS)}")
    for path, dimension in space.items() if sampler == "grid" else ():
        try:
            dimension.grid()
        except RecipeError as error:
            raise RecipeError(f"--space {path}: {error}") from None


def _sampler(name: str, space: Space, seed: int) -> BaseSampler:
    if name == "grid":
        return Grid({path: [_storable(value) for value in one.grid()] for path, one in space.items()}, seed=0)
    return RandomSampler(seed=seed) if name == "random" else TPESampler(seed=seed)


def _pruner(name: str | None) -> optuna.pruners.BasePruner:
    if name is None:
        return optuna.pruners.NopPruner()
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3)
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)


def exhausted(study: optuna.Study) -> bool:
    """Whether a grid has been searched completely."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return isinstance(study.sampler, GridSampler) and not waiting and study.sampler.is_exhausted(study)


def values_of(trial: Trial, space: Space, recipe: Recipe) -> dict[str, Any]:
    """The sampler's values for a trial, without fields that a swapped-in section lacks."""
    chosen: dict[str, Any] = {}
    for path, dimension in space.items():
        if has_field(with_swaps(recipe, chosen, space), path):
            chosen[path] = _suggest(trial, path, dimension)
    return chosen


def with_swaps(recipe: Recipe, values: Mapping[str, Any], space: Space) -> Recipe:
    """The recipe with the values; a swapped-in method uses its default learning rate unless it is searched."""
    changed = with_values(recipe, values)
    if changed.method.kind != recipe.method.kind and RATE not in space:
        return with_values(changed, {RATE: None})
    return changed


def _suggest(trial: Trial, path: str, dimension: Dimension) -> Any:
    if isinstance(dimension, Choices):
        names = [_storable(value) for value in dimension.values]
        return dimension.values[names.index(trial.suggest_categorical(path, names))]
    if dimension.whole:
        return trial.suggest_int(
            path, int(dimension.low), int(dimension.high), step=int(dimension.step or 1), log=dimension.log
        )
    return trial.suggest_float(path, dimension.low, dimension.high, step=dimension.step, log=dimension.log)


def _storable(value: Any) -> Any:
    """A choice as Optuna stores it: lists and mappings as JSON."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, sort_keys=True)


def decided(trial: FrozenTrial, space: Space) -> dict[str, Any]:
    """The values of a trial as the recipe's fields accept them."""
    values = {}
    for path, value in trial.params.items():
        dimension = space[path]
        if isinstance(dimension, Choices):
            value = next(one for one in dimension.values if _storable(one) == value)
        values[path] = value
    return values


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that ended, except those resumed by another."""
    replaced = {trial.user_attrs.get(SUPERSEDES) for trial in study.trials}
    return [trial for trial in study.trials if trial.state.is_finished() and trial.number not in replaced]


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials with a result."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def same_values(study: optuna.Study, trial: Trial) -> FrozenTrial | None:
    """An earlier complete trial with the same values, whose result would be the same."""
    return next((other for other in complete_trials(study) if other.params == trial.params), None)


def folder_number(trial: Trial | FrozenTrial) -> int:
    """The number of the trial's folder."""
    return int(trial.user_attrs.get(FOLDER, trial.number))


def importances(study: optuna.Study) -> dict[str, float]:
    """Optuna's importance of each hyperparameter; empty with too few trials."""
    done = complete_trials(study)
    if len(done) < 4 or len({trial.value for trial in done}) < 2:
        return {}
    shared = set.intersection(*(set(trial.params) for trial in done))
    varied = [path for path in sorted(shared) if len({str(trial.params[path]) for trial in done}) > 1]
    return dict(optuna.importance.get_param_importances(study, params=varied)) if varied else {}


def _queue_stopped(study: optuna.Study) -> None:
    """Closes trials that were running when the study was stopped and queues them to resume in their folders."""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={FOLDER: folder_number(trial), SUPERSEDES: trial.number},
                system_attrs=trial.system_attrs,
                intermediate_values=trial.intermediate_values,
            )
        )
