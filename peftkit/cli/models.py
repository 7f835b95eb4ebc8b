"""The commands that write models: ``export`` and ``quantize``. Thin: what they do is elsewhere."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from peftkit.errors import RecipeError, did_you_mean
from peftkit.schema import catalog, overrides

To = Annotated[Path, typer.Option(metavar="FOLDER", help="A folder that does not exist yet, or is empty.")]


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run, such as runs/NAME-….")],
    to: To,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base: one plain model.")] = False,
    to_format: Annotated[
        str, typer.Option("--format", help="peft; onnx: a classifier with its adapter in one ONNX file; or onnx-int8.")
    ] = "peft",
) -> None:
    """Write what a run learned to a folder that other libraries load, with a proof that it gives the same outputs."""
    from peftkit.export import run_export

    if to_format not in (known := ("peft", "onnx", "onnx-int8")):
        raise RecipeError(f"--format {to_format}: {did_you_mean(to_format, known)}")
    print(run_export(run, to, merge=merge, to_format=to_format), file=sys.stderr)


def quantize(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A name from `peftkit list`, a .yaml or a .py file, of NF4.")
    ],
    to: To,
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[part.field=value]...", help="Changes, such as model.source=./mine.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Training rows to choose the rounding on.")] = 128,
    tune_rows: Annotated[int, typer.Option(help="Training rows to train scales on; 0 trains none.")] = 0,
    block_size: Annotated[int, typer.Option(help="Weights that share a scale: 32 takes 0.13 bits more for each.")] = 64,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A linear layer that stays whole, such as v_proj.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
) -> None:
    """Write a recipe's base model in NF4, rounded for the rows that it will be trained on."""
    chosen = overrides.apply(catalog.get_recipe(recipe), changes or ())
    from peftkit.quantize import command as quantization

    found = quantization.quantize(chosen, to, rows=rows, tune_rows=tune_rows, block_size=block_size, keep=keep or ())
    print(json.dumps(found, indent=2) if as_json else quantization.table(found), end="\n" if as_json else "")
    others = [
        change for change in changes or () if not change.startswith(("model.source", "model.revision", "quantization"))
    ]
    go_on = ["peftkit", "train", recipe, f"model.source={to.resolve()}", "quantization=null", *others]
    print(f"wrote {to}; train over it with `{shlex.join(go_on)}`", file=sys.stderr)
