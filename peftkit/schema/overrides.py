"""Dotted overrides: ``training.epochs=1`` → a new validated Recipe.

Values are read as YAML, so that ``evaluation.metrics=[accuracy, f1]`` is a list and ``quantization=null``
is none; ``method.kind=frozen`` (or ``method=frozen``) swaps the section, which then starts from its own defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from peftkit.errors import RecipeError, did_you_mean
from peftkit.schema.recipe import Recipe, merge
from peftkit.schema.recipe_yaml import value_of
from peftkit.schema.sections import ConfigSection

BY_KIND = ("method", "task", "quantization")


def apply(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """A new recipe with the overrides applied in order; raises RecipeError naming the override and the field."""
    values = recipe.model_dump()
    overrides = list(overrides)
    # a swapped section or source loses what belonged to the old one: swaps go first, so that order does not matter
    for override in sorted(overrides, key=lambda text: not _goes_first(text)):
        path, value = parse(override)
        _set(values, path, value, override, recipe)
    return Recipe.parse(values, origin=f"override {' '.join(overrides)}" if overrides else f"recipe '{recipe.name}'")


def parse(override: str) -> tuple[list[str], Any]:
    """``"training.epochs=1"`` → ``(["training", "epochs"], 1)``; raises RecipeError where there is no ``=``."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"override '{override}': expected part.field=value, such as training.epochs=1")
    if len(text) == 1 and not text.isalnum() and not text.isspace() and text != "~":
        return path.strip().split("."), text  # a lone mark is text (a separator), whatever it means in YAML
    try:
        value = value_of(text) if text.strip() else ""
    except (yaml.YAMLError, RecursionError):
        raise RecipeError(f"override '{override}': '{text}' is not a value that YAML can read; quote it") from None
    return path.strip().split("."), value


def is_swap(path: str) -> bool:
    """Whether the field chooses the kind of a section."""
    part, _, field = path.partition(".")
    return part in BY_KIND and field in {"", "kind"}


def _goes_first(override: str) -> bool:
    path = override.partition("=")[0].strip()
    return is_swap(path) or path.endswith((".source", ".kind"))


def _set(values: dict[str, Any], path: list[str], value: Any, override: str, recipe: Recipe) -> None:
    part, *fields = path
    if part not in values:
        raise RecipeError(f"override '{override}': no field '{part}': {_hint(part, recipe)}")
    if part in BY_KIND and not fields and isinstance(value, str):
        value = {"kind": value}
    for field in reversed(fields):
        value = {field: value}
    values[part] = merge(values[part], value)


def _hint(name: str, recipe: Recipe) -> str:
    """Points ``epochs`` to ``training.epochs``: the section that has such a field, else the nearest section."""
    for part in Recipe.model_fields:
        section = getattr(recipe, part)
        if isinstance(section, ConfigSection) and name in type(section).model_fields:
            return f"did you mean '{part}.{name}'?"
    return did_you_mean(name, Recipe.model_fields)
