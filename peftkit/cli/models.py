"""Commands that write models: ``export`` and ``quantize``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from peftkit.cli.commands import AsJson, Overrides, RecipeName, RunFolder, load_recipe, report
from peftkit.errors import RecipeError
from peftkit.schema import overrides
from peftkit.schema.registries import EXPORTERS

To = Annotated[Path, typer.Option(metavar="FOLDER", help="A new or empty folder.")]


class ExportCommand(TyperCommand):
    """Takes a format's options as `--type q8_0` as well, and lists the formats in the help of `peftkit export`.

    The formats are imported only when that help is shown.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        return super().parse_args(ctx, _with_options_as_values(args, {*known, *ctx.help_option_names}))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            if parameter.name == "to_format":
                names = ", ".join(EXPORTERS)
                parameter.help = f"{names}; `peftkit list --formats` describes them."  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def _with_options_as_values(args: list[str], known: set[str]) -> list[str]:
    """Spells every option that is not the command's own, `--name value` or `--name`, as `name=value` or `name=true`."""
    values, pending = [], list(args)
    while pending:
        arg = pending.pop(0)
        name, sign, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or f"--{name}" in known or not name:
            values.append(arg)
            continue
        if not sign:
            value = pending.pop(0) if pending and not pending[0].startswith("-") else "true"
        values.append(f"{name.replace('-', '_')}={value}")
    return values


def export(
    run: RunFolder,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A new or empty folder. Not needed with --push.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base: one plain model.")] = False,
    as_lora: Annotated[
        bool, typer.Option("--as-lora", help="Write any method's change of weights as a plain LoRA: --format lora.")
    ] = False,
    to_format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", autocompletion=lambda: list(EXPORTERS))
    ] = "peft",
    push: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Push the export to the Hugging Face hub; its token is HF_TOKEN."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push, create a private repository.")] = False,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="With --push, the license of the card, such as apache-2.0.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[option=value]...", help="Options of the format; --option value is the same."),
    ] = None,
) -> None:
    """Export a run for other libraries or the hub, with a proof of equal outputs."""
    if push is None and (private or license):
        raise RecipeError("--private and --license belong to --push USER/NAME")
    if push is None and to is None:
        raise RecipeError("expected --to FOLDER, or --push USER/NAME")
    if as_lora:
        if merge or to_format not in ("peft", "lora"):
            raise RecipeError("--as-lora is --format lora; leave --merge and other formats out")
        to_format = "lora"
    values = {".".join(path): value for path, value in map(overrides.parse, options or ())}
    values |= {"merge": merge, "to_format": to_format}
    if push is not None:
        from peftkit.export.push import push_export

        report(push_export(run, push, to=to, private=private, license=license, **values))
        return
    from peftkit.export import run_export

    assert to is not None
    report(run_export(run, to, **values))


def quantize(
    recipe: RecipeName,
    to: To,
    changes: Overrides = None,
    rows: Annotated[int, typer.Option(help="Training rows for calibration.")] = 128,
    tune_rows: Annotated[int, typer.Option(help="Training rows to train the scales on; 0 for none.")] = 0,
    block_size: Annotated[int, typer.Option(help="Weights per scale; 32 takes 0.13 bits more per weight.")] = 64,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Linear layer to leave unquantized, such as v_proj.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a recipe's base model in NF4, calibrated on its training rows."""
    chosen = load_recipe(recipe, changes)
    from peftkit.quantize import command

    metrics = command.quantize(chosen, to, rows=rows, tune_rows=tune_rows, block_size=block_size, keep=keep or ())
    print(json.dumps(metrics, indent=2) if as_json else command.table(metrics), end="\n" if as_json else "")
    replaced = ("model.source", "model.revision", "quantization")
    others = [change for change in changes or () if not change.startswith(replaced)]
    next_command = ["peftkit", "train", recipe, f"model.source={to.resolve()}", "quantization=null", *others]
    report(f"wrote {to}; train on it with `{shlex.join(next_command)}`")
