"""The ``peftkit`` command: its groups of commands are one file each in this folder.

Whatever needs torch is imported inside the command that needs it, so that ``peftkit list`` answers at once. Results
go to stdout and messages to stderr, so that every command works in a pipe.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from peftkit import __version__
from peftkit.cli import data, experiments, inference, launch, models, recipes, serving, training
from peftkit.cli.commands import guarded
from peftkit.system.cores import limit_spinning

app = typer.Typer(
    name="peftkit",
    help="Parameter-efficient finetuning of any Hugging Face model, from one recipe.",
    epilog="First steps: peftkit list · peftkit show bbc_news_lora · peftkit inspect bbc_news_lora · "
    "peftkit train bbc_news_lora",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the ``peftkit`` command."""
    limit_spinning()
    app(args=launch.name_newest(sys.argv[1:]))


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Options that precede any command."""
    if show:
        print(__version__)
        raise typer.Exit()


COMMANDS: dict[str, Callable[..., None]] = {
    "list": recipes.list_items,
    "show": recipes.show,
    "schema": recipes.schema,
    "inspect": data.inspect,
    "plan": data.plan,
    "train": training.train,
    "evaluate": training.evaluate,
    "compare": experiments.compare,
    "tune": experiments.tune,
    "predict": inference.predict,
    "embed": inference.embed,
    "search": inference.search,
    "mine": inference.mine,
    "generate": inference.generate,
    "chat": inference.chat,
    "serve": serving.serve,
    "monitor": serving.monitor,
    "export": models.export,
    "quantize": models.quantize,
    "doctor": recipes.doctor,
}
for _name, _function in COMMANDS.items():
    app.command(_name, cls=models.ExportCommand if _name == "export" else None)(guarded(_name, _function))
