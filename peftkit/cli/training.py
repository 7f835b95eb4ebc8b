"""Commands that train and score: ``train`` and ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli import launch
from peftkit.cli.commands import (
    ANY_RECIPE,
    AsJson,
    Backend,
    Delimiter,
    Merge,
    Overrides,
    RunFolder,
    given,
    load_recipe,
    show_values,
)
from peftkit.errors import RecipeError, RunError
from peftkit.schema import overrides
from peftkit.schema.recipe import Recipe


def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help=f"{ANY_RECIPE} Not needed with --resume RUN.")
    ] = None,
    changes: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[RUN]", help="Resume this run, or the newest run of the recipe."),
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="What may differ when resuming, such as data.")
    ] = None,
) -> None:
    """Run a recipe in this process; use `accelerate launch recipes/NAME.py` for several."""
    words = [text for text in (recipe, *(changes or ())) if text]
    if words and "=" not in words[0]:
        chosen = load_recipe(words[0], words[1:])
    elif resume and resume != launch.NEWEST:
        file = Path(resume) / "recipe.yaml"
        if not file.is_file():
            raise RunError(f"{resume}: expected the folder of a run with a recipe.yaml, found none")
        chosen = overrides.apply(Recipe.from_yaml(file), words)
    else:
        raise RecipeError("expected a recipe (`peftkit list` shows them), or --resume RUN")
    launch.train(chosen, resume, tuple(allow or ()))


def evaluate(
    run: RunFolder,
    file: Annotated[Path | None, typer.Option(help="Rows with labels, instead of a split of the run's data.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    delimiter: Delimiter = None,
    merge: Merge = None,
    backend: Backend = None,
    as_json: AsJson = False,
) -> None:
    """Score a finished run on its own data or on a file."""
    from peftkit.distributed import process_group
    from peftkit.inference import evaluate

    with process_group.init_process_group() as group:
        options = given(merge=merge, delimiter=delimiter, backend=backend)
        metrics = evaluate.evaluate(run, split=split, file=file, group=group, **options)
    if launch.is_main_rank():
        show_values(metrics, as_json)
