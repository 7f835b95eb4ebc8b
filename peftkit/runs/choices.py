"""What a run chose for its method's automatic fields: ``choices.json`` in its folder, read again on resume.

The run's recipe has the chosen values; the file has what was asked for in their place, and the estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from peftkit.errors import RunError
from peftkit.runs.folder import RECIPE
from peftkit.schema.automatic import Choice
from peftkit.schema.recipe import Recipe, replace
from peftkit.schema.validation import describe
from peftkit.system import files

FILE = "choices.json"


def write(folder: Path, choices: Sequence[Choice]) -> None:
    """Stores the choices of a run, if it made any."""
    if choices:
        files.write_json(folder / FILE, [asdict(choice) for choice in choices])


def read(folder: Path) -> tuple[Choice, ...]:
    """The choices of a run, in the order in which they were made; raises RunError where the file is damaged."""
    file = folder / FILE
    if not file.is_file():
        return ()
    try:
        return TypeAdapter(tuple[Choice, ...]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise RunError(describe(error, f"{file}: not as peftkit writes it")) from None


def settled(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe with the chosen value."""
    return replace(recipe, method={choice.field: choice.value})


def restored(recipe: Recipe, folder: Path) -> tuple[Recipe, tuple[Choice, ...]]:
    """The recipe of a run that is resumed, with what the run chose before, and these choices.

    Raises:
        RunError: the recipe asks for a choice by other options than the run's.
    """
    choices = read(folder)
    for choice in choices:
        wanted = recipe.method.automatic().get(choice.field)
        if wanted is None:
            continue
        if (asked := wanted.model_dump(mode="json")) != choice.asked:
            raise RunError(
                f"{folder} cannot be resumed: method.{choice.field} was chosen for {choice.asked}, and the recipe has "
                f"{asked}. Undo the change, start a new run, or set method.{choice.field}={choice.value}, which was "
                "chosen then"
            )
        recipe = settled(recipe, choice)
    return recipe, choices


def asked_recipe(run: Path) -> Recipe:
    """The recipe that a run was started with: what it chose is automatic again."""
    recipe = Recipe.from_yaml(run / RECIPE)
    fields = {choice.field: dict(choice.asked) for choice in read(run)}
    return replace(recipe, method=fields) if fields else recipe
