"""The smallest set of changes with which a recipe fits, each with what it costs in time.

One change is tried before two, two before three, among fewer rows a pass, checkpointing, quantization, and shorter
rows, which alone change what is learned from.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from peftkit.errors import UserError
from peftkit.planning.devices import Device
from peftkit.planning.plan import Plan, PlanInputs, make_plan
from peftkit.schema.recipe import Recipe, replace

SHORTEST = 64
"""Tokens below which rows are not cut."""
Change = dict[str, Any]


@dataclass(frozen=True)
class Suggestion:
    """Changes of a recipe that make it fit."""

    changes: tuple[str, ...]
    """As overrides: ``training.micro_batch=2``."""
    plan: Plan
    slower: float
    """Its time by that of the recipe as it was."""


def suggest(plan: Plan, known: PlanInputs) -> Suggestion | None:
    """The fewest changes that fit, the quickest among equals; None where none does."""
    if plan.fits:
        return None
    moves = _moves(plan)
    for count in range(1, len(moves) + 1):
        found = []
        for chosen in combinations(moves.values(), count):
            made = _first_that_fits(plan, chosen, known)
            if made is not None:
                found.append(made)
        if found:
            return min(found, key=lambda suggestion: suggestion.slower)
    return None


def _moves(plan: Plan) -> dict[str, list[Change]]:
    """Kinds of change, each as its steps from mild to strong."""
    recipe, largest = plan.recipe, plan.workload.largest
    moves: dict[str, list[Change]] = {}
    if largest.rows > 1:
        rows, steps = largest.rows, []
        while rows > 1:
            rows //= 2
            steps.append({"training": {"micro_batch": rows}})
        moves["micro_batch"] = steps
    if recipe.training.gradient_checkpointing != "full":
        modes = ["selective", "full"] if recipe.training.gradient_checkpointing == "off" else ["full"]
        moves["checkpointing"] = [{"training": {"gradient_checkpointing": mode}} for mode in modes]
    if recipe.quantization is None:
        moves["quantization"] = [{"quantization": {"kind": "nf4", "double": True}}]
    length, steps = largest.tokens, []
    while length // 2 >= SHORTEST:
        length //= 2
        steps.append({"data": {"max_length": length}})
    if steps:
        moves["length"] = steps
    return moves


def _first_that_fits(plan: Plan, kinds: tuple[list[Change], ...], known: PlanInputs) -> Suggestion | None:
    """The mildest of some kinds of change that fits; the strongest is tried first, for where it fails none will do."""
    strongest = _try(plan.recipe, [steps[-1] for steps in kinds], plan.device, known)
    if strongest is None or not strongest.fits:
        return None
    for depth in range(max(map(len, kinds))):
        chosen = [steps[min(depth, len(steps) - 1)] for steps in kinds]
        changed = _try(plan.recipe, chosen, plan.device, known)
        if changed is not None and changed.fits:
            return Suggestion(tuple(map(_spelled, chosen)), changed, changed.seconds / plan.seconds)
    return None


def _try(recipe: Recipe, changes: list[Change], device: Device, known: PlanInputs) -> Plan | None:
    """The plan of a changed recipe; None where its method does not allow the change."""
    values: Change = {}
    for change in changes:
        for part, fields in change.items():
            values[part] = {**values.get(part, {}), **fields}
    try:
        return make_plan(replace(recipe, **values), device, known)
    except UserError:
        return None


def _spelled(change: Change) -> str:
    ((part, fields),) = change.items()
    if "kind" in fields:
        inside = ", ".join(f"{name}: {str(value).lower()}" for name, value in fields.items())
        return f"{part}={{{inside}}}"
    return " ".join(f"{part}.{name}={value}" for name, value in fields.items())
