"""The smallest set of changes that makes a recipe fit a device, and their cost in time.

Single changes are tried before pairs, and pairs before triples, of: fewer rows per micro-batch, checkpointing,
quantization, offloading of frozen blocks, and shorter rows, which alone change what is learned from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations

from peftkit.errors import UserError
from peftkit.planning.plan import Plan, PlanInputs, make_plan
from peftkit.schema import overrides

SHORTEST = 64
"""Tokens below which rows are not truncated."""


@dataclass(frozen=True)
class Suggestion:
    """Changes that make a recipe fit."""

    changes: tuple[str, ...]
    """As overrides: ``training.micro_batch=2``."""
    plan: Plan
    slower: float
    """Its time relative to the unchanged recipe."""


def suggest(plan: Plan, inputs: PlanInputs) -> Suggestion | None:
    """The fewest changes that fit, the fastest among equals; None if the plan fits or nothing helps."""
    if plan.fits:
        return None
    options = _options(plan)
    planned = cache(lambda changes: _plan_changed(plan, changes, inputs))
    smallest = planned(tuple(steps[-1] for steps in options))
    if smallest is not None and not smallest.fits:
        return None
    for count in range(1, len(options) + 1):
        suggestions = [_first_that_fits(plan, kinds, planned) for kinds in combinations(options, count)]
        fitting = [suggestion for suggestion in suggestions if suggestion is not None]
        if fitting:
            return min(fitting, key=lambda suggestion: suggestion.slower)
    return None


def _options(plan: Plan) -> list[list[str]]:
    """Kinds of change, each from mild to strong, as overrides."""
    recipe, largest = plan.recipe, plan.workload.largest
    checkpointing = recipe.training.gradient_checkpointing
    modes = {"off": ["selective", "full"], "full": []}.get(str(checkpointing), ["full"])
    options = [
        [f"training.micro_batch={rows}" for rows in _halvings(largest.rows, 1)],
        [f"training.gradient_checkpointing={mode}" for mode in modes],
        ["quantization={kind: nf4, double: true}"] if recipe.quantization is None else [],
        [f"model.offload={'cpu' if plan.device.gpu else 'disk'}"] if recipe.model.offload is None else [],
        [f"data.max_length={tokens}" for tokens in _halvings(largest.tokens, SHORTEST)],
    ]
    return [steps for steps in options if steps]


def _halvings(value: int, smallest: int) -> list[int]:
    """value/2, value/4, … down to the smallest."""
    return [value >> shift for shift in range(1, value.bit_length()) if value >> shift >= smallest]


def _first_that_fits(
    plan: Plan, kinds: tuple[list[str], ...], planned: Callable[[tuple[str, ...]], Plan | None]
) -> Suggestion | None:
    """The mildest combination of some kinds of change that fits."""
    strongest = planned(tuple(steps[-1] for steps in kinds))
    if strongest is None or not strongest.fits:  # then no other combination fits
        return None
    for depth in range(max(map(len, kinds))):
        changes = tuple(steps[min(depth, len(steps) - 1)] for steps in kinds)
        changed = planned(changes)
        if changed is not None and changed.fits:
            return Suggestion(changes, changed, changed.seconds / plan.seconds)
    return None


def _plan_changed(plan: Plan, changes: tuple[str, ...], inputs: PlanInputs) -> Plan | None:
    """The plan of the changed recipe; None if its method does not allow the change."""
    try:
        return make_plan(overrides.apply(plan.recipe, changes), plan.device, inputs)
    except UserError:
        return None
