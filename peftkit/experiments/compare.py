"""``peftkit compare``: methods side by side on the user's own data, each in a process of its own.

found = peftkit.compare("bbc_news_lora", methods=["lora", "frozen"], seeds=3)
print(found.pick)
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import Interrupted, RecipeError, RunError
from peftkit.experiments import jobs as working
from peftkit.experiments.jobs import DONE, InProcessRunner, Job, Outcome, Runner, SubprocessRunner
from peftkit.experiments.table import Group, check_names, tabulate
from peftkit.experiments.variants import Variant, parse_vary, variants
from peftkit.reporting import comparison as reporting
from peftkit.runs import folder as folders
from peftkit.runs.resume import NOT_LEARNED_FROM
from peftkit.schema import catalog
from peftkit.schema.recipe import Recipe, flatten, replace
from peftkit.system.parallel import cores

Given = str | Path | Recipe


@dataclass(frozen=True)
class Comparison:
    """A finished comparison; shows itself as a table in a notebook."""

    table: Mapping[str, Any]
    """What compare.json holds: ``variants``, ``baselines``, ``metric``, ``pick`` and more."""
    path: Path | None = None
    """Folder of compare.json, compare.md, compare.html and the runs; None of runs that were there before."""

    @property
    def pick(self) -> str:
        """The cheapest variant that is not significantly worse than the best, as a sentence."""
        return str(self.table["pick"])

    def __getitem__(self, label: str) -> Mapping[str, Any]:
        """The row of a variant or baseline."""
        return next(row for row in (*self.table["variants"], *self.table["baselines"]) if row["variant"] == label)

    def _repr_html_(self) -> str:
        return reporting.fragment(self.table)


def compare(
    recipes: Given | Sequence[Given],
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
    """Trains every variant on the same rows and sets them side by side; finished runs are only set side by side.

    Called again with the same folder it trains what is missing or failed.

    Args:
        recipes: recipes (objects, names, files), or folders of finished runs.
        methods: kinds of method to swap in; none keeps each recipe's own.
        vary: dotted fields with their values, ``{"method.rank": [4, 8]}`` or ``["method.rank=4,8"]``; all
            combinations are trained, and a field that a method lacks is not varied for it.
        seeds: how many training seeds each variant gets, or the seeds themselves.
        changes: overrides of every recipe, such as ``training.epochs=1``.
        out: the folder; None takes ``compare-NAME`` in the recipe's output_dir.
        jobs: variants trained at a time.
        metric: the figure compared; None takes the task's own.
        against: the variant that the others are compared with; None takes the best.
        cost: what "cheap" means: parameters, time, memory or size.
        isolated: train every variant in a process of its own; False starts sooner, but a crash ends everything.
        quiet: say nothing while it goes on.

    Raises:
        RecipeError: an unknown name, or variants that would not see the same rows.
        RunError: the folder is in use, or holds other variants under the same labels; runs of different data.
        Interrupted: Ctrl-C; what is done is kept, and the same call goes on.
    """
    given = [recipes] if isinstance(recipes, (str, Path, Recipe)) else list(recipes)
    runs = [Path(one) for one in given if not isinstance(one, Recipe) and (Path(one) / folders.RECIPE).is_file()]
    if runs:
        if len(runs) < len(given) or methods or vary or changes or seeds != 1:
            raise RecipeError("finished runs are compared as they are: give runs alone, or recipes")
        return Comparison(tabulate("runs", _groups_of(runs), metric=metric, against=against, cost=cost))
    if not given:
        raise RecipeError("which recipes? `peftkit list` names them")
    varied = vary if isinstance(vary, Mapping) else parse_vary(vary)
    chosen = [one if isinstance(one, Recipe) else catalog.get_recipe(str(one)) for one in given]
    made = variants(chosen, methods=methods, vary=varied, changes=changes)
    check_names([Group(variant.label) for variant in made], against=against, cost=cost)
    _refuse_other_rows(made)
    folder = Path(out) if out else Path(chosen[0].output_dir) / f"compare-{chosen[0].name}"
    runner: Runner = _processes(jobs) if isolated else InProcessRunner()
    counted = _seeds(seeds, chosen[0])
    with working.in_use(folder):
        work = ComparisonRun(folder, made, counted, runner, 1 if isinstance(runner, InProcessRunner) else jobs, quiet)
        stopped = work.run()
        table = tabulate(chosen[0].name, work.groups(), metric=metric, against=against, cost=cost)
        reporting.write(table, folder)
    if stopped:
        raise Interrupted(f"stopped; what is done stands in {folder}, and the same command goes on", signal.SIGINT)
    return Comparison(table, folder)


def _seeds(seeds: int | Sequence[int], recipe: Recipe) -> list[int]:
    if not isinstance(seeds, int):
        return list(dict.fromkeys(seeds))
    if seeds < 1:
        raise RecipeError(f"--seeds: expected 1 or more, found {seeds}")
    return [recipe.training.seed + number for number in range(seeds)]


def _processes(jobs: int) -> SubprocessRunner:
    if jobs < 1:
        raise RecipeError(f"--jobs: expected 1 or more, found {jobs}")
    if jobs == 1:
        return SubprocessRunner()
    import torch

    return SubprocessRunner(threads=max(1, cores() // jobs), devices=torch.cuda.device_count())


@dataclass
class ComparisonRun:
    """The runs of a comparison, those that are done already among them."""

    folder: Path
    variants: Sequence[Variant]
    seeds: Sequence[int]
    runner: Runner
    jobs: int
    quiet: bool

    def __post_init__(self) -> None:
        self.outcomes: dict[tuple[str, int], Outcome] = {}
        for variant, seed in self._all():
            job, done = self._job(variant, seed), working.earlier(self._job(variant, seed))
            if done is None or done.status != DONE or not Path(done.run or "").is_dir():
                continue
            old = working.earlier_recipe(job)
            if old is None or not working.same_recipe(old, job.recipe):
                raise RunError(
                    f"{job.folder} holds '{variant.label}' of another recipe{_first_difference(old, job.recipe)}; give "
                    "this comparison a folder of its own: --out FOLDER"
                )
            self.outcomes[variant.label, seed] = done

    def run(self) -> bool:
        """Trains what is missing; returns whether it was stopped."""
        left = [pair for pair in self._all() if (pair[0].label, pair[1]) not in self.outcomes]
        try:
            if self.jobs == 1:
                for number, (variant, seed) in enumerate(left):
                    self._one(variant, seed, f"{number + 1} of {len(left)}")
            else:
                self._together(left)
        except KeyboardInterrupt:
            return True
        return False

    def groups(self) -> list[Group]:
        """Each variant with its finished runs and what went wrong."""
        made = []
        for variant in self.variants:
            ended = [self.outcomes.get((variant.label, seed), Outcome("stopped")) for seed in self.seeds]
            runs = [Path(str(outcome.run)) for outcome in ended if outcome.status == DONE]
            wrong = [outcome for outcome in ended if outcome.status != DONE]
            status = DONE if not wrong else f"{len(runs)} of {len(ended)}" if runs else wrong[0].status
            said = tuple(dict.fromkeys(outcome.message for outcome in wrong if outcome.message))
            made.append(Group(variant.label, runs, status, said))
        return made

    def _all(self) -> list[tuple[Variant, int]]:
        """All variants with the first seed, then with the second …: an early stop still leaves a whole table."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]

    def _job(self, variant: Variant, seed: int) -> Job:
        recipe = variant.seeded(seed)
        if seed != self.seeds[0]:  # told once a variant
            recipe = replace(recipe, evaluation={"baselines": ()}, export={"prove": False})
        return Job(self.folder / "runs" / variant.slug / f"seed-{seed}", recipe)

    def _together(self, left: Sequence[tuple[Variant, int]]) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                waited = [
                    pool.submit(self._one, variant, seed, f"{number + 1} of {len(left)}")
                    for number, (variant, seed) in enumerate(left)
                ]
                for future in waited:
                    future.result()
            except BaseException:
                self.runner.stop()
                raise

    def _one(self, variant: Variant, seed: int, place: str) -> None:
        name = f"{variant.label}, seed {seed}" if len(self.seeds) > 1 else variant.label
        self._say(f"[{place}] {name}: started")
        metric = variant.recipe.training.best_metric

        def on_validation(step: int, figures: Mapping[str, float]) -> bool:
            wanted = [metric] if metric and metric in figures else list(figures)[:2]
            self._say(f"[{place}] {name}: step {step}: {', '.join(f'{one} {figures[one]:.4f}' for one in wanted)}")
            return True

        outcome = self.runner.run(self._job(variant, seed), on_validation)
        self.outcomes[variant.label, seed] = outcome
        self._say(f"[{place}] {name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.message}".rstrip())

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


# -- the same rows for all -----------------------------------------------------------------------------------------


def _refuse_other_rows(made: Sequence[Variant]) -> None:
    """Raises RecipeError where a variant would read other rows or splits; augmented copies of the rows may vary."""
    from peftkit.data.pipeline import prepare

    known: dict[str, str] = {}
    first = None
    for variant in made:
        plain = replace(variant.recipe, data={"augmentation": None})
        key = json.dumps([plain.data.model_dump(mode="json"), plain.task.model_dump(mode="json")], sort_keys=True)
        if key not in known:
            known[key] = prepare(plain).fingerprint
        if first is None:
            first = (plain, known[key])
        elif known[key] != first[1]:
            raise RecipeError(
                f"'{variant.label}' would be trained or scored on other rows than '{made[0].label}'"
                f"{_first_difference(first[0], plain, only=('data', 'task'))}; compare on the same data"
            )


def _first_difference(old: Recipe | None, new: Recipe, only: tuple[str, ...] = ()) -> str:
    """`` (training.epochs 3 → 1)``, or the empty string."""
    before, after = flatten(old) if old else {}, flatten(new)
    for name in sorted(set(before) | set(after)):
        wanted = not only or name.partition(".")[0] in only
        if wanted and name not in working.NOT_LEARNED and before.get(name) != after.get(name):
            return f" ({name} {before.get(name)} → {after.get(name)})"
    return ""


def _groups_of(runs: Sequence[Path]) -> list[Group]:
    """Finished runs, those that differ in nothing but their seed together; raises RunError for other data."""
    found: dict[str, list[Path]] = {}
    for run in dict.fromkeys(runs):
        fields = flatten(Recipe.from_yaml(run / folders.RECIPE))
        beside = ("name", "training.seed", "training.threads", *NOT_LEARNED_FROM)
        learned = {name: value for name, value in fields.items() if not name.startswith(beside)}
        found.setdefault(json.dumps(learned, sort_keys=True), []).append(run)
    marks = {run: _data_of(run) for run in runs}
    for run in runs[1:]:
        if marks[run] != marks[runs[0]]:
            raise RunError(f"{run} was trained on other rows than {runs[0]}; compare runs of the same data and splits")
    return [Group(group[0].name, group) for group in found.values()]


def _data_of(run: Path) -> str:
    about = run / "about.json"
    mark = json.loads(about.read_text(encoding="utf-8")).get("data") if about.is_file() else None
    if not mark:
        raise RunError(f"{run}: expected a finished run that names its data in about.json; train it again")
    return str(mark)
