"""The variants of a comparison: recipes × methods × varied fields, each with a distinguishing label."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from peftkit.errors import RecipeError, did_you_mean
from peftkit.schema import overrides
from peftkit.schema.overrides import is_swap
from peftkit.schema.recipe import Recipe, replace
from peftkit.schema.recipe_yaml import value_of
from peftkit.schema.registries import METHODS
from peftkit.schema.sections import ConfigSection

RATE = "training.learning_rate"


@dataclass(frozen=True)
class Variant:
    """One recipe of a comparison, trained with each of the seeds."""

    label: str
    """Such as ``lora``, ``lora rank=4`` or ``frozen``."""
    recipe: Recipe

    @property
    def slug(self) -> str:
        """The label as a folder name."""
        return re.sub(r"[^A-Za-z0-9.=,+-]+", "_", self.label).strip("_.") or "variant"


def variants(
    recipes: Sequence[Recipe],
    *,
    methods: Sequence[str] = (),
    vary: Mapping[str, Sequence[Any]],
    changes: Sequence[str] = (),
) -> list[Variant]:
    """Every combination once; a field that a method lacks is not varied for it.

    A swapped-in method uses its own default learning rate unless ``changes`` or ``vary`` set one: a LoRA's rate would
    ruin full finetuning.

    Raises:
        RecipeError: an unknown method or field, a value that a field does not accept, or two variants with the same
            label.
    """
    sets_rate = any(change.partition("=")[0].strip() == RATE for change in changes)
    planned: list[Variant] = []
    used: set[str] = set()
    for recipe in recipes:
        base = overrides.apply(recipe, changes)
        for method in methods or (None,):
            swapped = base if method is None else _with_method(base, method, keep_rate=sets_rate)
            fields = [path for path in vary if has_field(swapped, path)]
            used.update(fields)
            for values in itertools.product(*(vary[path] for path in fields)):
                chosen = dict(zip(fields, values))
                words = [recipe.name] if len(recipes) > 1 else []
                words += [method] if method else []
                words += [f"{path.rpartition('.')[2]}={_shown(value)}" for path, value in chosen.items()]
                planned.append(Variant(" ".join(words) or recipe.name, with_values(swapped, chosen)))
    for path in vary:
        if path not in used:
            with_values(overrides.apply(recipes[0], changes), {path: vary[path][0]})  # raises the error
    _refuse_equal_labels(planned)
    return planned


def parse_vary(texts: Iterable[str]) -> dict[str, list[Any]]:
    """``["method.rank=4,8"]`` → ``{"method.rank": [4, 8]}``; raises RecipeError."""
    fields: dict[str, list[Any]] = {}
    for text in texts:
        path, equals, values = (piece.strip() for piece in text.partition("="))
        try:
            listed = value_of(f"[{values}]") if equals and values else []
        except (yaml.YAMLError, RecursionError):
            listed = []
        if not path or not listed:
            raise RecipeError(f"--vary {text}: expected part.field=value,value, such as method.rank=4,8,16")
        if path in fields:
            raise RecipeError(f"--vary {text}: '{path}' is given twice; give all its values at once")
        fields[path] = listed
    return fields


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with fields set by their dotted names; raises RecipeError as overrides do."""
    return overrides.apply(recipe, [f"{path}={json.dumps(value)}" for path, value in values.items()])


def _with_method(recipe: Recipe, method: str, *, keep_rate: bool) -> Recipe:
    if method not in METHODS:
        raise RecipeError(f"--methods: unknown method '{method}': {did_you_mean(method, METHODS.names())}")
    if method == recipe.method.kind:
        return recipe
    rate = {} if keep_rate else {"training": {"learning_rate": None}}
    return replace(recipe, method={"kind": method}, **rate)


def has_field(recipe: Recipe, path: str) -> bool:
    """Whether the recipe has such a field; an optional section that is not set has all, a quantization none."""
    section: Any = recipe
    for name in path.split("."):
        if not isinstance(section, ConfigSection):  # not set, or a mapping
            return section is not None or is_swap(path) or not path.startswith("quantization.")
        if name not in type(section).model_fields:
            return False
        section = getattr(section, name)
    return True


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _refuse_equal_labels(variants: Sequence[Variant]) -> None:
    slugs: dict[str, str] = {}
    for variant in variants:
        if variant.slug.lower() in slugs:
            raise RecipeError(
                f"two variants have the label '{variant.label}'; give each recipe, method and value once, and "
                "different recipes different names (name=…)"
            )
        slugs[variant.slug.lower()] = variant.label
