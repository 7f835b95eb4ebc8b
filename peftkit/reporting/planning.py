"""``peftkit plan``: a plan as tables for people, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from peftkit.errors import RecipeError
from peftkit.planning import devices
from peftkit.planning.devices import format_bytes
from peftkit.planning.fitting import Suggestion, suggest
from peftkit.planning.plan import Plan, collect_inputs, make_plan
from peftkit.planning.table import PRECISIONS, Cell, methods_table
from peftkit.reporting import tables
from peftkit.schema.recipe import Recipe


def plan_command(
    recipe: Recipe | None, *, table: str | None, gpu: str | None, as_json: bool, apply: Path | None
) -> str:
    """The output of ``peftkit plan``: the plan of a recipe, or the table of a base model.

    Args:
        recipe: the recipe to plan; None if ``table`` names a base model.
        gpu: a size or a card; None for this machine's device.
        apply: where to write the recipe with the changes that make it fit.

    Raises:
        UserError: wrong input, or no change makes the recipe fit.
    """
    device = devices.parse_device(gpu) if gpu else devices.local_device()
    if table is not None:
        cells = methods_table(table, device)
        return json.dumps([asdict(cell) for cell in cells], indent=2) + "\n" if as_json else _table_text(cells, table)
    assert recipe is not None
    inputs = collect_inputs(recipe, device)
    plan = make_plan(recipe, device, inputs)
    suggestion = suggest(plan, inputs)
    if apply is not None:
        if not plan.fits and suggestion is None:
            raise RecipeError(
                f"{recipe.name} does not fit {device.name} with any known change; {apply} was not written"
            )
        chosen = suggestion.plan.recipe if suggestion else recipe
        try:
            apply.write_text(chosen.to_yaml(defaults=False), encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"--apply {apply}: cannot be written: {error.strerror}") from None
    return json.dumps(to_json(plan, suggestion), indent=2) + "\n" if as_json else text(plan, suggestion)


def text(plan: Plan, suggestion: Suggestion | None) -> str:
    """Trained parameters, memory by phase, time, and whether it fits."""
    largest = plan.workload.largest
    trained = sum(part.parameters for part in plan.parameters if part.trainable)
    total = sum(part.parameters for part in plan.parameters)
    verdict = "fits" if plan.fits else "does not fit"
    return _printed(
        f"{plan.recipe.name}: {plan.recipe.method.kind}, frozen weights stored as {plan.dtype}",
        f"trainable: {trained:,} of {total:,} parameters ({trained / total:.2%})",
        _phases(plan),
        f"largest micro-batch: {largest.rows} rows × {largest.tokens} tokens; {plan.workload.steps:,} steps, "
        f"{plan.flops_per_token / 1e9:.2f} GFLOP per token, about {duration(plan.seconds)}",
        f"peak {format_bytes(plan.peak.total)} in {plan.peak.name}: {verdict} {plan.device.name} "
        f"({format_bytes(plan.device.memory)})",
        *remedies(plan, suggestion),
        *(f"note: {note}" for note in plan.notes),
    )


def remedies(plan: Plan, suggestion: Suggestion | None) -> list[str]:
    """The changes that make it fit, in words."""
    if plan.fits:
        return []
    if suggestion is None:
        return ["no change of micro-batch, checkpointing, quantization or length makes it fit; use a smaller model"]
    changes = " ".join(f"'{change}'" if " " in change else change for change in suggestion.changes)
    return [f"fits with {changes}: {format_bytes(suggestion.plan.peak.total)}, {suggestion.slower:.2f} × the time"]


def _table_text(cells: Sequence[Cell], model: str) -> str:
    table = tables.table(f"peak memory with {model}, one row of 512 tokens", "method", "trained", *PRECISIONS)
    for method in dict.fromkeys(cell.method for cell in cells):
        row = {cell.precision: cell for cell in cells if cell.method == method}
        trained = max(cell.trained for cell in row.values())
        sizes = [format_bytes(row[name].peak) if not row[name].reason else "–" for name in PRECISIONS]
        table.add_row(method, f"{trained:,}", *sizes)
    return _printed(table)


def _printed(*lines: RenderableType) -> str:
    """Tables and lines as they are printed on stdout."""
    console = tables.console()
    with console.capture() as capture:
        for line in lines:
            console.print(line, markup=False, soft_wrap=isinstance(line, str))
    return capture.get()


def duration(seconds: float) -> str:
    """``3 s``, ``12 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _phases(plan: Plan) -> Table:
    names = dict.fromkeys(name for phase in plan.phases for name in phase.parts)
    table = tables.table("memory by phase", "part", *(phase.name for phase in plan.phases))
    table.columns[1 + plan.phases.index(plan.peak)].style = "bold"
    for name in names:
        sizes = [phase.parts.get(name, 0) for phase in plan.phases]
        if any(sizes):
            table.add_row(name, *(format_bytes(size) if size else "" for size in sizes))
    table.add_row("total", *(format_bytes(phase.total) for phase in plan.phases), style="bold")
    return table


def to_json(plan: Plan, suggestion: Suggestion | None) -> dict[str, Any]:
    """The plan and the suggestion as JSON values."""
    remedy = suggestion and {
        "changes": list(suggestion.changes),
        "peak_bytes": suggestion.plan.peak.total,
        "slower": suggestion.slower,
    }
    return {**plan.to_json(), "suggestion": remedy}
