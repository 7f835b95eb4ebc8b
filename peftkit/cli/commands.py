"""What the commands share: arguments with their help texts, one message per error, printing by name."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit.cli import launch
from peftkit.errors import RunError
from peftkit.schema import catalog, overrides
from peftkit.schema.recipe import Recipe

ANY_RECIPE = "A name from `peftkit list`, or a .yaml or .py file."
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help=ANY_RECIPE)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[part.field=value]...", help="Overrides, such as training.epochs=1 or method.kind=frozen."),
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a finished run, such as runs/NAME-…, or hub:USER/NAME.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Merge = Annotated[
    bool | None,
    typer.Option(
        "--merge/--no-merge",
        help="Merge the adapter into the base, in memory only. Default: merge where possible.",
        show_default=False,
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What predicts: torch, or onnx or onnx-int8 if exported. Default: auto, measured on the first texts.",
        show_default=False,
    ),
]
Delimiter = Annotated[
    str | None,
    typer.Option(help="Separator of a CSV file, one character, tab or auto. Default: the recipe's data.delimiter."),
]

PARALLEL = ("train", "doctor", "evaluate", "predict", "embed", "generate")
"""Commands that may run in several processes."""


def guarded(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """The command with each error reported as one message, and its output flushed while that still holds."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        with launch.one_message():
            if name not in PARALLEL and int(os.environ.get("WORLD_SIZE") or 1) > 1:
                raise RunError(
                    f"peftkit {name} runs in one process, but the launcher started {os.environ['WORLD_SIZE']}; run it "
                    f"without a launcher (only {', '.join(PARALLEL)} run in several processes)"
                )
            function(*arguments, **options)
            sys.stdout.flush()

    return run


def load_recipe(name: str, changes: list[str] | None) -> Recipe:
    """The recipe of that name with overrides applied."""
    return overrides.apply(catalog.get_recipe(name), changes or ())


def given(**options: Any) -> dict[str, Any]:
    """The options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def show_values(values: Mapping[str, Any], as_json: bool = False) -> None:
    """Prints values by name, aligned, or as JSON."""
    if as_json:
        print(json.dumps(dict(values), indent=2))
        return
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def report(message: str) -> None:
    """Prints a message to stderr, from the main process only."""
    if launch.is_main_rank():
        print(message, file=sys.stderr)
