"""Commands that look things up: ``list``, ``show``, ``schema``, ``doctor``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from peftkit.cli.commands import AsJson, Overrides, RecipeName, load_recipe, show_values
from peftkit.schema import catalog, registries
from peftkit.schema.recipe import Recipe


def list_items(
    methods: Annotated[bool, typer.Option("--methods", help="List the methods.")] = False,
    tasks: Annotated[bool, typer.Option("--tasks", help="List the tasks.")] = False,
    formats: Annotated[bool, typer.Option("--formats", help="List the export formats.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the recipes, what a recipe can be composed of, or the formats of `peftkit export`."""
    if methods:
        from peftkit.methods import table

        print(json.dumps(table.as_json(), indent=2) if as_json else table.text())
        return
    registry = registries.TASKS if tasks else registries.EXPORTERS if formats else None
    summaries = registry.summaries() if registry else catalog.summaries()
    rows: list[dict[str, Any]] = [{"name": name, "summary": text} for name, text in summaries.items()]
    if not registry:
        files = catalog.built_in()
        rows = [row | {"file": str(files[row["name"]]) if row["name"] in files else None} for row in rows]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        show_values(summaries)


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
