"""Commands to run before training: ``inspect`` and ``plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.commands import ANY_RECIPE, AsJson, Overrides, load_recipe, report
from peftkit.errors import RecipeError


def inspect(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help=f"{ANY_RECIPE} Not needed with --marked.")
    ] = None,
    changes: Overrides = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page with histograms.")] = None,
    as_json: AsJson = False,
    marked: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Reviewed generations; those marked good are written to --out."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Training rows (.jsonl) from --marked.")] = None,
    bad: Annotated[
        bool, typer.Option("--bad", help="With --marked, keep those marked bad too, with a label for task.loss=kto.")
    ] = False,
) -> None:
    """Show the data as the model will see it, without training."""
    if marked or out or bad:
        _keep_marked(marked, out, recipe, bad=bad)
        return
    if recipe is None:
        raise RecipeError("expected a recipe (`peftkit list` shows them), or --marked FILE --out FILE")
    from peftkit.planning import inspection as inspecting
    from peftkit.reporting import inspection as view

    inspection = inspecting.inspect(load_recipe(recipe, changes))
    print(json.dumps(inspection.as_dict(), indent=2) if as_json else view.as_text(inspection))
    if html:
        view.write_html(inspection, html)
        report(f"wrote {html}")


def plan(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help=f"{ANY_RECIPE} Not needed with --table.")
    ] = None,
    changes: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(help="Plan for a GPU: a size (8GB) or a card (rtx4090). Default: this machine.")
    ] = None,
    as_json: AsJson = False,
    apply: Annotated[
        Path | None, typer.Option(metavar="OUT.yaml", help="Write the recipe with the changes that make it fit.")
    ] = None,
    table: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Show methods × precisions × memory for a base model.")
    ] = None,
) -> None:
    """Estimate memory and time of a recipe, and whether it fits, without loading weights."""
    if (recipe is None) == (table is None):
        raise RecipeError("expected either a recipe (`peftkit list` shows them) or --table MODEL")
    chosen = load_recipe(recipe, changes) if recipe else None
    from peftkit.reporting import planning

    print(planning.plan_command(chosen, table=table, gpu=gpu, as_json=as_json, apply=apply), end="")


def _keep_marked(marked: Path | None, out: Path | None, recipe: str | None, *, bad: bool) -> None:
    if marked is None or out is None or recipe is not None:
        raise RecipeError("--marked FILE needs --out FILE and takes no recipe")
    from peftkit.review import generations
    from peftkit.system import files

    files.check_output(out, marked)
    rows = generations.marked_to_training_rows(marked, bad=bad)
    with files.open_atomic(out) as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    which = "good or bad, with a label" if bad else "good"
    report(f"wrote {len(rows)} of {len(generations.read(marked))} generations (those marked {which}) to {out}")
