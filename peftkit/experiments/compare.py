"""``peftkit compare``: methods compared on the user's own data, each in its own process."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.errors import Interrupted, RecipeError, RunError
from peftkit.experiments import jobs as experiment_jobs
from peftkit.experiments.jobs import DONE, InProcessRunner, Job, Outcome, Runner, SubprocessRunner
from peftkit.experiments.table import Group, check_names, tabulate
from peftkit.experiments.variants import Variant, parse_vary, variants
from peftkit.reporting import comparison as reporting
from peftkit.reporting import experiment
from peftkit.runs import folder as folders
from peftkit.runs.choices import asked_recipe
from peftkit.runs.resume import NOT_LEARNED_FROM
from peftkit.schema import catalog
from peftkit.schema.recipe import Recipe, flatten, replace
from peftkit.system.cores import cores

RecipeOrRun = str | Path | Recipe


@dataclass(frozen=True)
class Comparison:
    """A finished comparison; a notebook displays it as a table."""

    table: Mapping[str, Any]
    """The content of compare.json: ``variants``, ``baselines``, ``metric``, ``pick`` and more."""
    path: Path | None = None
    """Folder of compare.json, compare.md, compare.html and the runs; None for runs finished earlier."""

    @property
    def pick(self) -> str:
        """The cheapest variant that is not significantly worse than the best, as a sentence."""
        return str(self.table["pick"])

    def __getitem__(self, label: str) -> Mapping[str, Any]:
        """The row of a variant or baseline."""
        return next(row for row in (*self.table["variants"], *self.table["baselines"]) if row["variant"] == label)

    def _repr_html_(self) -> str:
        return experiment.render(reporting.page(self.table), standalone=False)


def compare(
    recipes: RecipeOrRun | Sequence[RecipeOrRun],
    *,
    methods: Sequence[str] = (),
    vary: Mapping[str, Sequence[Any]] | Sequence[str] = (),
    seeds: int | Sequence[int] = 1,
    changes: Sequence[str] = (),
    out: str | Path | None = None,
    jobs: int = 1,
    metric: str | None = None,
    against: str | None = None,
    cost: str = "parameters",
    isolated: bool = True,
    quiet: bool = False,
) -> Comparison:
    """Trains every variant on the same rows and compares them; finished runs are only compared.

    Called again with the same folder, it trains what is missing or failed.

    Args:
        recipes: recipes (objects, names, files), or folders of finished runs.
        methods: kinds of method to try; none keeps each recipe's own.
        vary: dotted fields with their values, ``{"method.rank": [4, 8]}`` or ``["method.rank=4,8"]``; all
            combinations are trained; a field that a method lacks is not varied for it.
        seeds: number of training seeds per variant, or the seeds themselves.
        changes: overrides for every recipe, such as ``training.epochs=1``.
        out: the folder; None for ``compare-NAME`` in the recipe's output_dir.
        jobs: variants trained at the same time.
        metric: the metric to compare; None for the task's own.
        against: the variant to compare the others with; None for the best.
        cost: parameters, time, memory or size.
        isolated: train every variant in its own process; False starts sooner, but a crash ends everything.
        quiet: print no progress.

    Raises:
        RecipeError: an unknown name, or variants that would not see the same rows.
        RunError: the folder is in use or contains other variants with the same labels; runs of different data.
        Interrupted: Ctrl-C; finished runs stay, and the same call resumes.
    """
    items = [recipes] if isinstance(recipes, (str, Path, Recipe)) else list(recipes)
    runs = [Path(one) for one in items if not isinstance(one, Recipe) and (Path(one) / folders.RECIPE).is_file()]
    if runs:
        if len(runs) < len(items) or methods or vary or changes or seeds != 1:
            raise RecipeError("finished runs take no methods, overrides or seeds; give only runs, or only recipes")
        return Comparison(tabulate("runs", _groups_of(runs), metric=metric, against=against, cost=cost))
    if not items:
        raise RecipeError("expected at least one recipe (`peftkit list` shows them)")
    chosen = [one if isinstance(one, Recipe) else catalog.get_recipe(str(one)) for one in items]
    varied = vary if isinstance(vary, Mapping) else parse_vary(vary)
    planned = variants(chosen, methods=methods, vary=varied, changes=changes)
    check_names([Group(variant.label) for variant in planned], against=against, cost=cost)
    _refuse_other_rows(planned)
    folder = Path(out) if out else Path(chosen[0].output_dir) / f"compare-{chosen[0].name}"
    runner: Runner = _subprocesses(jobs) if isolated else InProcessRunner()
    training_seeds = _seeds(seeds, chosen[0])
    with experiment_jobs.in_use(folder):
        work = ComparisonRun(folder, planned, training_seeds, runner, jobs if isolated else 1, quiet)
        stopped = work.run()
        table = tabulate(chosen[0].name, work.groups(), metric=metric, against=against, cost=cost)
        experiment.write(folder, "compare", table, reporting.page(table))
    if stopped:
        raise Interrupted(f"stopped; finished runs are in {folder}; repeat the command to resume", signal.SIGINT)
    return Comparison(table, folder)


def _seeds(seeds: int | Sequence[int], recipe: Recipe) -> list[int]:
    if not isinstance(seeds, int):
        return list(dict.fromkeys(seeds))
    if seeds < 1:
        raise RecipeError(f"--seeds: expected 1 or more, found {seeds}")
    return [recipe.training.seed + number for number in range(seeds)]


def _subprocesses(jobs: int) -> SubprocessRunner:
    if jobs < 1:
        raise RecipeError(f"--jobs: expected 1 or more, found {jobs}")
    if jobs == 1:
        return SubprocessRunner()
    import torch

    return SubprocessRunner(threads=max(1, cores() // jobs), devices=torch.cuda.device_count())


@dataclass
class ComparisonRun:
    """The runs of a comparison, including those of earlier calls."""

    folder: Path
    variants: Sequence[Variant]
    seeds: Sequence[int]
    runner: Runner
    jobs: int
    quiet: bool
    outcomes: dict[tuple[str, int], Outcome] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for variant, seed in self._all():
            job = self._job(variant, seed)
            done, old = experiment_jobs.earlier(job), experiment_jobs.earlier_recipe(job)
            if done is None or done.status != DONE or not Path(done.run or "").is_dir():
                continue
            if old is None or not experiment_jobs.same_recipe(old, job.recipe):
                raise RunError(
                    f"{job.folder} contains '{variant.label}' of another recipe{_first_difference(old, job.recipe)}; "
                    "choose another folder with --out"
                )
            self.outcomes[variant.label, seed] = done

    def run(self) -> bool:
        """Trains what is missing; returns whether it was interrupted."""
        missing = [pair for pair in self._all() if (pair[0].label, pair[1]) not in self.outcomes]
        numbered = [(*pair, f"{number} of {len(missing)}") for number, pair in enumerate(missing, 1)]
        try:
            if self.jobs > 1:
                self._in_parallel(numbered)
            else:
                for variant, seed, place in numbered:
                    self._train(variant, seed, place)
        except KeyboardInterrupt:
            return True
        return False

    def groups(self) -> list[Group]:
        """Each variant with its finished runs and the errors of the others."""
        groups = []
        for variant in self.variants:
            ended = [self.outcomes.get((variant.label, seed), Outcome("stopped")) for seed in self.seeds]
            runs = [Path(str(outcome.run)) for outcome in ended if outcome.status == DONE]
            failed = [outcome for outcome in ended if outcome.status != DONE]
            status = DONE if not failed else f"{len(runs)} of {len(ended)}" if runs else failed[0].status
            messages = tuple(dict.fromkeys(outcome.message for outcome in failed if outcome.message))
            groups.append(Group(variant.label, runs, status, messages))
        return groups

    def _all(self) -> list[tuple[Variant, int]]:
        """All variants with the first seed, then with the second …, so that an early stop leaves a complete table."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]

    def _job(self, variant: Variant, seed: int) -> Job:
        recipe = replace(variant.recipe, training={"seed": seed})
        if seed != self.seeds[0]:  # once per variant is enough
            recipe = replace(recipe, evaluation={"baselines": ()}, export={"prove": False})
        return Job(self.folder / "runs" / variant.slug / f"seed-{seed}", recipe)

    def _in_parallel(self, numbered: Sequence[tuple[Variant, int, str]]) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                for future in [pool.submit(self._train, *one) for one in numbered]:
                    future.result()
            except BaseException:
                self.runner.stop()
                raise

    def _train(self, variant: Variant, seed: int, place: str) -> None:
        name = f"{variant.label}, seed {seed}" if len(self.seeds) > 1 else variant.label
        self._report(f"[{place}] {name}: started")
        metric = variant.recipe.training.best_metric

        def on_validation(step: int, metrics: Mapping[str, float]) -> bool:
            names = [metric] if metric and metric in metrics else list(metrics)[:2]
            self._report(f"[{place}] {name}: step {step}: {', '.join(f'{one} {metrics[one]:.4f}' for one in names)}")
            return True

        outcome = self.runner.run(self._job(variant, seed), on_validation)
        self.outcomes[variant.label, seed] = outcome
        self._report(f"[{place}] {name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.message}".rstrip())

    def _report(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _refuse_other_rows(variants: Sequence[Variant]) -> None:
    """Raises RecipeError if a variant would read other rows or splits; augmentation may vary."""
    from peftkit.data.pipeline import prepare

    fingerprints: dict[str, str] = {}
    plain = [replace(variant.recipe, data={"augmentation": None}) for variant in variants]
    for variant, recipe in zip(variants, plain):
        key = recipe.data.model_dump_json() + recipe.task.model_dump_json()
        if key not in fingerprints:
            fingerprints[key] = prepare(recipe).rows_fingerprint
        if len(set(fingerprints.values())) > 1:
            raise RecipeError(
                f"'{variant.label}' would use other rows than '{variants[0].label}'"
                f"{_first_difference(plain[0], recipe, only=('data', 'task'))}; compare on the same data"
            )


def _first_difference(old: Recipe | None, new: Recipe, only: tuple[str, ...] = ()) -> str:
    """`` (training.epochs 3 → 1)``, or the empty string."""
    before, after = flatten(old) if old else {}, flatten(new)
    for name in sorted(set(before) | set(after)):
        wanted = not only or name.partition(".")[0] in only
        if wanted and name not in experiment_jobs.NOT_LEARNED and before.get(name) != after.get(name):
            return f" ({name} {before.get(name)} → {after.get(name)})"
    return ""


def _groups_of(runs: Sequence[Path]) -> list[Group]:
    """Finished runs grouped by everything but their seed; raises RunError for different data."""
    groups: dict[str, list[Path]] = {}
    for run in dict.fromkeys(runs):
        fields = flatten(asked_recipe(run))
        ignored = ("name", "training.seed", "training.threads", *NOT_LEARNED_FROM)
        learned = {name: value for name, value in fields.items() if not name.startswith(ignored)}
        groups.setdefault(json.dumps(learned, sort_keys=True), []).append(run)
    fingerprints = [_data_of(run) for run in runs]
    for run, fingerprint in zip(runs, fingerprints):
        if fingerprint != fingerprints[0]:
            raise RunError(
                f"{run} was trained on other rows than {runs[0]}; compare runs with the same data and splits"
            )
    return [Group(group[0].name, group) for group in groups.values()]


def _data_of(run: Path) -> str:
    about = run / "about.json"
    known = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    fingerprint = known.get("rows") or known.get("data")
    if not fingerprint:
        raise RunError(f"{run}: expected the fingerprint of its data in about.json; train it again")
    return str(fingerprint)
