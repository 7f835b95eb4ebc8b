"""Dotted overrides: ``training.epochs=1`` → a new validated Recipe.

Values are read as YAML, so that ``evaluation.metrics=[accuracy, f1]`` and ``quantization=null`` mean what they say;
``method.kind=frozen`` (or ``method=frozen``) swaps the part, which then starts from its own defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from peftkit.errors import RecipeError, did_you_mean
from peftkit.parts import Part
from peftkit.recipe import Recipe

BY_KIND = ("method", "task", "quantization")


def apply(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """A new recipe with the overrides applied in order; raises RecipeError naming the override and the field."""
    values = recipe.model_dump()
    overrides = list(overrides)
    # a swapped part loses its old fields, so swaps go first and fields of the new kind may stand anywhere
    for override in sorted(overrides, key=lambda text: not _is_swap(text)):
        path, value = parse(override)
        _set(values, path, value, override, recipe)
    return Recipe.parse(values, origin=f"override {' '.join(overrides)}" if overrides else f"recipe '{recipe.name}'")


def parse(override: str) -> tuple[list[str], Any]:
    """``"training.epochs=1"`` → ``(["training", "epochs"], 1)``; raises RecipeError where there is no ``=``."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"override '{override}': expected part.field=value, such as training.epochs=1")
    try:
        value = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError:
        raise RecipeError(f"override '{override}': '{text}' is not a value that YAML can read; quote it") from None
    return path.strip().split("."), value


def _is_swap(override: str) -> bool:
    path = override.partition("=")[0].strip()
    return path in BY_KIND or path.removesuffix(".kind") in BY_KIND and path.endswith(".kind")


def _set(values: dict[str, Any], path: list[str], value: Any, override: str, recipe: Recipe) -> None:
    if path[0] not in Recipe.model_fields:
        raise RecipeError(f"override '{override}': no field '{path[0]}': {_hint(path[0], recipe)}")
    if len(path) == 2 and path[1] == "kind" and path[0] in BY_KIND:
        old = values[path[0]] or {}
        values[path[0]] = old if old.get("kind") == value else {"kind": value}
        return
    if len(path) == 1 and path[0] in BY_KIND and isinstance(value, str):
        value = {"kind": value}
    here: Any = values
    for step in path[:-1]:
        if here.get(step) is None:
            here[step] = {}
        here = here[step]
        if not isinstance(here, dict):
            raise RecipeError(f"override '{override}': '{step}' has no fields of its own")
    if len(path) == 1 and isinstance(value, Mapping) and isinstance(here.get(path[0]), dict) and "kind" not in value:
        value = {**here[path[0]], **value}
    here[path[-1]] = value


def _hint(name: str, recipe: Recipe) -> str:
    """Points ``epochs`` to ``training.epochs``: the part that has such a field, else the nearest part."""
    for part in Recipe.model_fields:
        held = getattr(recipe, part)
        if isinstance(held, Part) and name in type(held).model_fields:
            return f"did you mean '{part}.{name}'?"
    return did_you_mean(name, Recipe.model_fields)
