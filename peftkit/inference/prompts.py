"""Prompts as a run was trained to read them, and options of generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from peftkit.errors import DataError, RecipeError, did_you_mean
from peftkit.schema.recipe import GenerationConfig, Recipe
from peftkit.schema.validation import describe

Conversation = Sequence[Mapping[str, str]]
NOT_OPTIONS = ("samples", "prompts")
"""Fields of GenerationConfig that choose what an evaluation generates, not how."""


def generation_config(recipe: Recipe, options: Mapping[str, Any]) -> GenerationConfig:
    """The recipe's ``evaluation.generation`` with some fields replaced.

    Raises:
        RecipeError: an unknown option (the nearest is named), or a value that it cannot have.
    """
    known = [name for name in GenerationConfig.model_fields if name not in NOT_OPTIONS]
    for name in options:
        if name not in known:
            raise RecipeError(f"generation has no option '{name}': {did_you_mean(name, known)}")
    try:
        return GenerationConfig.model_validate({**recipe.evaluation.generation.model_dump(), **options})
    except ValidationError as error:
        raise RecipeError(describe(error, "generation")) from None


def as_prompts(prompts: Any, recipe: Recipe) -> list[str | list[dict[str, str]]]:
    """Several prompts as ``as_prompt`` gives them; a text, or a list of turns, is a single one."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping)):
        prompts = [prompts]
    return [as_prompt(prompt, recipe, f"prompt {number}: ") for number, prompt in enumerate(prompts, 1)]


def as_prompt(prompt: str | Conversation, recipe: Recipe, where: str = "") -> str | list[dict[str, str]]:
    """A prompt as the run was trained to read it: a text as it is, or turns under the recipe's system prompt.

    Raises:
        DataError: neither a text nor a conversation that awaits an answer; the message begins with ``where``.
    """
    from peftkit.tasks import conversation

    if isinstance(prompt, str):
        prompt = recipe.task.as_prompt(prompt)
        if isinstance(prompt, str):
            return prompt
    try:
        return conversation.read_open(prompt, "messages", recipe.data)
    except DataError as error:
        raise DataError(f"{where}{error.message}") from None
