"""Commands of many runs: ``compare`` and ``tune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.commands import ANY_RECIPE, AsJson, Overrides, RecipeName

Out = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Folder for results; run again with the same folder to resume.")
]
Metric = Annotated[str | None, typer.Option(metavar="NAME", help="Metric that decides. Default: the task's own.")]


def compare(
    items: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [part.field=value]...",
            help=f"{ANY_RECIPE} Overrides apply to all. Or folders of finished runs.",
        ),
    ],
    methods: Annotated[str | None, typer.Option(metavar="KIND,KIND", help="Methods: lora,frozen,full …")] = None,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=A,B", help="Values of a field, such as method.rank=4,8,16.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Training seeds per variant.")] = 1,
    jobs: Annotated[int, typer.Option(help="Variants trained at the same time.")] = 1,
    metric: Metric = None,
    against: Annotated[
        str | None, typer.Option(metavar="VARIANT", help="Compare the others with this variant. Default: the best.")
    ] = None,
    cost: Annotated[str, typer.Option(help="Cost of a variant: parameters, time, memory or size.")] = "parameters",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods trained on the same rows, each in its own process; or finished runs."""
    from peftkit.experiments.compare import compare as run_comparison
    from peftkit.reporting import comparison as view
    from peftkit.reporting import experiment

    changes = [text for text in items if "=" in text and not Path(text).exists()]
    comparison = run_comparison(
        [text for text in items if text not in changes],
        methods=[name.strip() for name in methods.split(",")] if methods else (),
        vary=vary or (), seeds=seeds, changes=changes, out=out, jobs=jobs, metric=metric, against=against, cost=cost,
    )  # fmt: skip
    if as_json:
        print(json.dumps(comparison.table, indent=2))
        return
    experiment.show(view.page(comparison.table))
    if comparison.path:
        print(f"\nReport: {comparison.path / 'compare.html'}")


def tune(
    recipe: RecipeName,
    changes: Overrides = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=SPEC",
            help="Search space: 1e-5..1e-2:log, 1..5, 8..64:step=8, or values 4,8,16; or a .yaml file of them.",
        ),
    ] = None,
    sampler: Annotated[str, typer.Option(help="grid, random or bayesian.")] = "bayesian",
    trials: Annotated[int, typer.Option(help="Total number of trials, earlier calls included.")] = 20,
    timeout: Annotated[str | None, typer.Option(help="Start no trial after this time: 90s, 30m, 2h.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Stop trials that are worse than the median.")] = False,
    pruner: Annotated[str | None, typer.Option(help="Stop poor trials early by median or halving.")] = None,
    metric: Metric = None,
    rows: Annotated[int | None, typer.Option(help="Training rows per trial; the best is trained on all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed for the sampler.")] = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Search hyperparameters on validation data; the best run is finished and tested once."""
    from peftkit.experiments.tune import tune as run_study
    from peftkit.reporting import experiment
    from peftkit.reporting import search as view

    study = run_study(
        recipe, space or (), changes=changes or (), sampler=sampler, trials=trials, timeout=timeout,
        pruner=pruner or ("median" if prune else None), metric=metric, rows=rows, seed=seed, out=out,
    )  # fmt: skip
    if as_json:
        print(json.dumps(study.table, indent=2))
        return
    experiment.show(view.page(study.table))
    print(f"\nRecipe: {study.path / 'best.yaml'}\nRun: {study.run.path}\nReport: {study.path / 'tune.html'}")
