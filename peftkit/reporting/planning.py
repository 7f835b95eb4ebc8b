"""``peftkit plan``: a plan as tables for people, and as JSON for programs."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peftkit.errors import RecipeError
from peftkit.planning import devices
from peftkit.planning.devices import format_bytes
from peftkit.planning.fitting import Suggestion, suggest
from peftkit.planning.plan import Plan, collect_inputs, make_plan
from peftkit.planning.table import PRECISIONS, Cell, methods_table
from peftkit.reporting.experiment import LOG_WIDTH
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
    inputs = collect_inputs(recipe)
    plan = make_plan(recipe, device, inputs)
    suggestion = suggest(plan, inputs)
    if apply is not None:
        _apply(plan, suggestion, apply)
    return json.dumps(to_json(plan, suggestion), indent=2) + "\n" if as_json else text(plan, suggestion)


def _apply(plan: Plan, suggestion: Suggestion | None, path: Path) -> None:
    if not plan.fits and suggestion is None:
        raise RecipeError(
            f"{plan.recipe.name} does not fit {plan.device.name} with any known change; {path} was not written"
        )
    chosen = suggestion.plan.recipe if suggestion else plan.recipe
    try:
        path.write_text(chosen.to_yaml(defaults=False), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--apply {path}: cannot be written: {error.strerror}") from None


def text(plan: Plan, suggestion: Suggestion | None) -> str:
    """Trained parameters, memory by phase, time, and whether it fits."""
    out = _console()
    largest = plan.workload.largest
    trained = sum(part.parameters for part in plan.parameters if part.trainable)
    total = sum(part.parameters for part in plan.parameters)
    out.print(f"{plan.recipe.name}: {plan.recipe.method.kind}, frozen weights stored as {plan.dtype}", markup=False)
    out.print(f"trainable: {trained:,} of {total:,} parameters ({trained / total:.2%})")
    out.print(_phases(plan))
    out.print(
        f"largest micro-batch: {largest.rows} rows × {largest.tokens} tokens; {plan.workload.steps:,} steps, "
        f"{plan.flops_per_token / 1e9:.2f} GFLOP per token, about {duration(plan.seconds)}"
    )
    verdict = "fits" if plan.fits else "does not fit"
    out.print(f"peak {format_bytes(plan.peak.total)} in {plan.peak.name}: {verdict} {plan.device.name} "
              f"({format_bytes(plan.device.memory)})", markup=False)  # fmt: skip
    for line in [*remedies(plan, suggestion), *(f"note: {note}" for note in plan.notes)]:
        out.print(line, markup=False, soft_wrap=True)
    return out.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def remedies(plan: Plan, suggestion: Suggestion | None) -> list[str]:
    """The changes that make it fit, in words."""
    if plan.fits:
        return []
    if suggestion is None:
        return ["no change of micro-batch, checkpointing, quantization or length makes it fit; use a smaller model"]
    changes = " ".join(f"'{change}'" if " " in change else change for change in suggestion.changes)
    return [f"fits with {changes}: {format_bytes(suggestion.plan.peak.total)}, {suggestion.slower:.2f} × the time"]


def _table_text(cells: Sequence[Cell], model: str) -> str:
    table = Table(title=f"peak memory with {model}, one row of 512 tokens")
    table.add_column("method")
    table.add_column("trained", justify="right")
    for precision in PRECISIONS:
        table.add_column(precision, justify="right")
    for method in dict.fromkeys(cell.method for cell in cells):
        row = {cell.precision: cell for cell in cells if cell.method == method}
        trained = max(cell.trained for cell in row.values())
        sizes = [format_bytes(row[name].peak) if not row[name].reason else "–" for name in PRECISIONS]
        table.add_row(method, f"{trained:,}", *sizes)
    out = _console()
    out.print(table)
    return out.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def _console() -> Console:
    """A console that writes to memory, as wide as the terminal, or as a log."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else LOG_WIDTH
    return Console(file=io.StringIO(), highlight=False, width=width, force_terminal=sys.stdout.isatty())


def duration(seconds: float) -> str:
    """``3 s``, ``12 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _phases(plan: Plan) -> Table:
    names = dict.fromkeys(name for phase in plan.phases for name in phase.parts)
    table = Table(title="memory by phase")
    table.add_column("part")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right", style="bold" if phase is plan.peak else "")
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
