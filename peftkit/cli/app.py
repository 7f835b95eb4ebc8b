"""The command line; ``peftkit --help`` names its commands. Those of many runs are in
``cli_experiments``, those that write models in ``cli_models``.

Whatever needs torch is imported inside the command that needs it, so that ``peftkit list`` answers at once. Results
go to stdout, everything said about them to stderr, so that every command can stand in a pipe.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit import __version__
from peftkit.cli import experiments, launch, models
from peftkit.errors import RecipeError, RunError
from peftkit.schema import catalog, overrides
from peftkit.schema.recipe import Recipe

app = typer.Typer(
    name="peftkit",
    help="Parameter-efficient finetuning of any Hugging Face model, from one recipe.",
    epilog="First steps: peftkit list · peftkit show bbc_news_lora · peftkit inspect bbc_news_lora · "
    "peftkit train bbc_news_lora",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ANY_RECIPE = "A name from `peftkit list`, a .yaml or a .py file."
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help=ANY_RECIPE)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[part.field=value]...", help="Changes, such as training.epochs=1 or method.kind=frozen."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run, such as runs/NAME-….")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Tokens written at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token; higher is more varied.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens that have this share together.")]
TopK = Annotated[int | None, typer.Option(help="Sample among this many of the likeliest tokens; 0 for all.")]
MergeInMemory = Annotated[
    bool | None,
    typer.Option(
        "--merge/--no-merge",
        help="Merge the adapter into the base, in memory only; without either, wherever that can be done.",
        show_default=False,
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling.")]


def main() -> None:
    """The ``peftkit`` command."""
    app(args=launch.name_newest(sys.argv[1:]))


SHARED = ("train", "doctor", "evaluate", "predict", "embed", "generate")
"""Commands that may run as several processes."""


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command whose errors end as one message and whose output is flushed while that still holds."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*arguments: Any, **options: Any) -> None:
            with launch.one_message():
                if name not in SHARED:
                    launch.one_process(name)
                function(*arguments, **options)
                sys.stdout.flush()

        return app.command(name)(guarded)

    return add


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Options that stand before any command."""
    if show:
        print(__version__)
        raise typer.Exit()


@command("list")
def list_recipes(
    methods: Annotated[bool, typer.Option("--methods", help="Name the methods in place of the recipes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Name the recipes that can be run, or the methods that they can use."""
    if methods:
        from peftkit.methods import table

        print(json.dumps(table.as_json(), indent=2) if as_json else table.text())
        return
    summaries, files = catalog.summaries(), catalog.built_in()
    if as_json:
        rows = [{"name": name, "summary": text, "file": _path(files.get(name))} for name, text in summaries.items()]
        print(json.dumps(rows, indent=2))
        return
    _show(summaries)


@command("show")
def show(
    recipe: RecipeName,
    changes: Overrides = None,
    defaults: Annotated[bool, typer.Option(help="Write the fields that are at their defaults, too.")] = True,
) -> None:
    """Print a recipe as YAML: the way to start your own (peftkit show NAME > mine.yaml)."""
    print(_recipe(recipe, changes).to_yaml(defaults=defaults), end="")


@command("schema")
def schema() -> None:
    """Print the JSON schema of recipes: every field, its meaning, its bounds; for editors."""
    print(json.dumps(Recipe.model_json_schema(), indent=2))


@command("inspect")
def inspect(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help=f"{ANY_RECIPE} Not needed with --marked FILE.")
    ] = None,
    changes: Overrides = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with histograms as well.")] = None,
    as_json: AsJson = False,
    marked: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Generations that a person marked: the good ones go to --out, to train on."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The .jsonl file that --marked makes.")] = None,
) -> None:
    """Show the data as the model will see it; nothing is trained."""
    if marked or out:
        _keep_marked(marked, out, recipe)
        return
    if recipe is None:
        raise RecipeError("which recipe? `peftkit list` names them; --marked FILE needs none")
    from peftkit.planning.inspection import inspect as look
    from peftkit.reporting import inspection

    found = look(_recipe(recipe, changes))
    print(json.dumps(inspection.as_json(found), indent=2) if as_json else inspection.as_text(found))
    if html:
        inspection.write_html(found, html)
        _say(f"wrote {html}")


@command("plan")
def plan(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help=f"{ANY_RECIPE} Not needed with --table MODEL.")
    ] = None,
    changes: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="A size (8GB) or a card (rtx4090); without it, what is here.")] = None,
    as_json: AsJson = False,
    apply: Annotated[
        Path | None, typer.Option(metavar="OUT.yaml", help="Write the recipe with the changes that make it fit.")
    ] = None,
    table: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Methods × precisions × memory of a base model.")
    ] = None,
) -> None:
    """Say what a recipe trains, takes in memory and time, and whether it fits; no weight is loaded."""
    if (recipe is None) == (table is None):
        raise RecipeError("expected a recipe (`peftkit list` names them), or --table MODEL")
    chosen = _recipe(recipe, changes) if recipe else None
    from peftkit.reporting import planning

    print(planning.plan_command(chosen, table=table, gpu=gpu, as_json=as_json, apply=apply), end="")


@command("train")
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help=f"{ANY_RECIPE} Not needed with --resume RUN.")
    ] = None,
    changes: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[RUN]", help="Go on with this run; without RUN, with the newest of this recipe."),
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="What may differ when resuming, such as data.")
    ] = None,
) -> None:
    """Carry a recipe out in this process; `accelerate launch recipes/NAME.py` does so in several."""
    given = [text for text in (recipe, *(changes or ())) if text]
    if given and "=" not in given[0]:
        chosen = _recipe(given[0], given[1:])
    elif resume and resume != launch.NEWEST:
        chosen = overrides.apply(_recipe_of_run(Path(resume)), given)
    else:
        raise RecipeError("which recipe? `peftkit list` names them; --resume RUN goes on with that run's own")
    launch.train(chosen, resume, tuple(allow or ()))


@command("evaluate")
def evaluate(
    run: RunFolder,
    file: Annotated[Path | None, typer.Option(help="Rows with labels, in place of a split of the run's data.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    merge: MergeInMemory = None,
    as_json: AsJson = False,
) -> None:
    """Score a finished run again, on its own data or on a file."""
    from peftkit.distributed import process_group
    from peftkit.inference import evaluate

    with process_group.init_process_group() as group:
        figures = evaluate.evaluate(run, split=split, file=file, merge=_merge(merge), group=group)
    if launch.is_main_rank():
        _show(figures, as_json)


@command("predict")
def predict(
    run: RunFolder,
    file: Annotated[
        Path | None, typer.Option(help="csv, tsv, jsonl or txt; without it, a text a line from stdin.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of the texts; the recipe's own by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="csv, tsv or jsonl; without it, JSON lines on stdout.")] = None,
    merge: MergeInMemory = None,
) -> None:
    """Give texts their labels, with the probability of every label."""
    from peftkit.inference import predict_file

    count = predict_file.predict_file(run, file=file, column=column, out=out, merge=_merge(merge))
    if out:
        _say(f"wrote {count} rows to {out}")


@command("embed")
def embed(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, or a base: hub id, ./folder, package:NAME.")
    ],
    file: Annotated[
        Path | None, typer.Option(help="csv, tsv, jsonl or txt; without it, a text a line from stdin.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the texts; the recipe's own by default, text for a base.")
    ] = None,
    pair: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of a second text that is read with the first.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="npy, parquet or jsonl; without it, JSON lines on stdout.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Vectors of length 1.")] = False,
) -> None:
    """Give texts their vectors, pooled as the model pools."""
    from peftkit.inference import embeddings

    count = embeddings.embed_file(source, file=file, column=column, out=out, normalize=normalize, pair=pair)
    if out:
        _say(f"wrote {count} vectors to {out}")


@command("generate")
def generate(
    run: RunFolder,
    file: Annotated[
        Path | None, typer.Option(help="Prompts: jsonl, csv or txt; without it, a prompt a line from stdin.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File of JSON lines; without it, they go to stdout.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    merge: MergeInMemory = None,
) -> None:
    """Continue or answer prompts with a language model; rows may hold prompt, messages, or instruction and input."""
    from peftkit.inference import generate_file

    options = _given(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    count = generate_file.generate_file(run, file=file, out=out, options=options, merge=_merge(merge))
    if out:
        _say(f"wrote {count} rows to {out}")


@command("chat")
def chat(
    run: RunFolder,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=RUN", help="Another run on the same base; /adapter NAME switches to it."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, in place of the recipe's.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    merge: MergeInMemory = None,
) -> None:
    """Talk with a language model: a line a turn, on the terminal or over a pipe; /help lists commands."""
    from peftkit.inference import chat as conversation
    from peftkit.inference import generate_file, trained_model

    options = _given(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    _, recipe = generate_file.language_run(run)
    trained_model.generation_config(recipe, options)  # a wrong option is told before the model is loaded
    model = trained_model.load(run, adapters=_adapters(adapter or []), merge=_merge(merge))
    conversation.chat(model.configured(**options), system=system)


command("export")(models.export)
command("quantize")(models.quantize)
command("compare")(experiments.compare)
command("tune")(experiments.tune)


@command("doctor")
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine offers: versions, devices, processes, the hub."""
    from peftkit.cli import doctor as examination

    _show(examination.examine(), as_json)


def _show(found: Mapping[str, Any], as_json: bool = False) -> None:
    """Prints values by name."""
    if as_json:
        print(json.dumps(dict(found), indent=2))
        return
    width = max(map(len, found), default=0)
    for name, value in found.items():
        print(f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def _recipe(name: str, changes: list[str] | None) -> Recipe:
    return overrides.apply(catalog.get_recipe(name), changes or ())


def _recipe_of_run(run: Path) -> Recipe:
    file = run / "recipe.yaml"
    if not file.is_file():
        raise RunError(f"{run}: expected the folder of a run, which holds its recipe.yaml; found none")
    return Recipe.from_yaml(file)


def _keep_marked(marked: Path | None, out: Path | None, recipe: str | None) -> None:
    if marked is None or out is None or recipe is not None:
        raise RecipeError("expected both --marked FILE and --out FILE, and no recipe: the marked generations are read")
    from peftkit.review import generations
    from peftkit.system import output_file

    output_file.check(out, marked)
    rows = generations.marked_to_training_rows(marked)
    with output_file.complete(out) as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _say(f"wrote {len(rows)} of {len(generations.read(marked))} generations, those marked good, to {out}")


def _adapters(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path or name in found:
            raise RunError(f"--adapter {text}: expected NAME=RUN, each name once, such as kjv=runs/style_kjv_lora-…")
        found[name] = path
    return found


def _merge(given: bool | None) -> Any:
    return "auto" if given is None else given


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _path(file: Path | None) -> str | None:
    return str(file) if file else None


def _say(message: str) -> None:
    if launch.is_main_rank():
        print(message, file=sys.stderr)
