"""The commands of many runs: ``compare`` and ``tune``. Thin: what they do is in ``peftkit.experiments``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

ANY_RECIPE = "A name from `peftkit list`, a .yaml or a .py file"
Out = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where it is kept; given again, it goes on with what is missing.")
]
Metric = Annotated[str | None, typer.Option(metavar="NAME", help="The figure that decides; the task's own by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]


def compare(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [part.field=value]...",
            help=f"{ANY_RECIPE}; changes of all of them; or folders of finished runs.",
        ),
    ],
    methods: Annotated[str | None, typer.Option(metavar="KIND,KIND", help="Methods: lora,frozen,full …")] = None,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=A,B", help="Values of a field, such as method.rank=4,8,16.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Training seeds of every variant.")] = 1,
    jobs: Annotated[int, typer.Option(help="Variants trained at a time.")] = 1,
    metric: Metric = None,
    against: Annotated[
        str | None, typer.Option(metavar="VARIANT", help="What the others are compared with; the best by default.")
    ] = None,
    cost: Annotated[str, typer.Option(help="What makes a variant cheap: parameters, time, memory or size.")] = (
        "parameters"
    ),
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Train methods on the same rows, each in a process of its own, and set them side by side; or finished runs."""
    from peftkit.experiments.compare import compare as run_comparison
    from peftkit.reporting import comparison as view

    changes = [text for text in given if "=" in text and not Path(text).exists()]
    comparison = run_comparison(
        [text for text in given if text not in changes],
        methods=[name.strip() for name in methods.split(",")] if methods else (),
        vary=vary or (), seeds=seeds, changes=changes, out=out, jobs=jobs, metric=metric, against=against, cost=cost,
    )  # fmt: skip
    if as_json:
        print(json.dumps(comparison.table, indent=2))
        return
    view.show(comparison.table)
    if comparison.path:
        print(f"\nReport: {comparison.path / 'compare.html'}")


def tune(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=f"{ANY_RECIPE}.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[part.field=value]...", help="Changes of the recipe.")
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=SPEC", help="1e-5..1e-2:log, 1..5, 8..64:step=8, or values: 4,8,16; or a .yaml file of them."
        ),
    ] = None,
    sampler: Annotated[str, typer.Option(help="grid, random or bayesian.")] = "bayesian",
    trials: Annotated[int, typer.Option(help="Trials in all, those of earlier calls included.")] = 20,
    timeout: Annotated[str | None, typer.Option(help="No trial starts after it: 90s, 30m, 2h.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="End poor trials early, by the median of the others.")] = False,
    pruner: Annotated[str | None, typer.Option(help="End poor trials early, by: median or halving.")] = None,
    metric: Metric = None,
    rows: Annotated[int | None, typer.Option(help="Training rows of a trial; the best is trained on all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Search hyperparameters by validation alone; the best is finished, and tested once."""
    from peftkit.experiments.tune import tune as run_study
    from peftkit.reporting import search

    study = run_study(
        recipe, space or (), changes=changes or (), sampler=sampler, trials=trials, timeout=timeout,
        pruner=pruner or ("median" if prune else None), metric=metric, rows=rows, seed=seed, out=out,
    )  # fmt: skip
    if as_json:
        print(json.dumps(study.table, indent=2))
        return
    search.show(study.table)
    print(f"\nRecipe: {study.path / 'best.yaml'}\nRun: {study.run.path}\nReport: {study.path / 'tune.html'}")
