"""Commands that look things up: ``list``, ``show``, ``schema``, ``doctor``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from peftkit.cli.commands import AsJson, Overrides, RecipeName, load_recipe, show_values
from peftkit.schema import catalog, registries
from peftkit.schema.recipe import Recipe


def list_items(
    methods: Annotated[bool, typer.Option("--methods", help="List methods.")] = False,
    tasks: Annotated[bool, typer.Option("--tasks", help="List tasks.")] = False,
    heads: Annotated[bool, typer.Option("--heads", help="List heads.")] = False,
    quantizations: Annotated[bool, typer.Option("--quantizations", help="List quantizations.")] = False,
    sources: Annotated[bool, typer.Option("--sources", help="List kinds of data source.")] = False,
    readers: Annotated[bool, typer.Option("--readers", help="List file readers.")] = False,
    baselines: Annotated[bool, typer.Option("--baselines", help="List baselines.")] = False,
    formats: Annotated[bool, typer.Option("--formats", help="List export formats.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the recipes, or what a recipe can be composed of, including what installed packages add."""
    if methods:
        from peftkit.methods import table

        print(json.dumps(table.as_json(), indent=2) if as_json else table.text())
        return
    registered = {
        registries.TASKS: tasks, registries.HEADS: heads, registries.QUANTIZATIONS: quantizations,
        registries.SOURCES: sources, registries.READERS: readers, registries.BASELINES: baselines,
        registries.EXPORTERS: formats,
    }  # fmt: skip
    registry = next((registry for registry, wanted in registered.items() if wanted), None)
    summaries = registry.summaries() if registry else catalog.summaries()
    if not as_json:
        show_values(summaries)
        return
    rows: list[dict[str, Any]] = [{"name": name, "summary": text} for name, text in summaries.items()]
    if registry is None:
        files = catalog.built_in()
        rows = [row | {"file": str(files[row["name"]]) if row["name"] in files else None} for row in rows]
    print(json.dumps(rows, indent=2))


def show(
    recipe: RecipeName,
    changes: Overrides = None,
    defaults: Annotated[bool, typer.Option(help="Include fields at their default values.")] = True,
) -> None:
    """Print a recipe as YAML, for instance to start your own: peftkit show NAME > mine.yaml."""
    print(load_recipe(recipe, changes).to_yaml(defaults=defaults), end="")


def schema() -> None:
    """Print the JSON schema of recipes (every field, its meaning and bounds), for editors."""
    print(json.dumps(Recipe.model_json_schema(), indent=2))


def doctor(as_json: AsJson = False) -> None:
    """Report what this machine offers: versions, devices, processes, the hub."""
    from peftkit.cli.doctor import examine

    show_values(examine(), as_json)
