"""``peftkit monitor``: served texts, by day, compared with the run's validation rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, date
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.errors import DataError, did_you_mean
from peftkit.export.folder import open_export
from peftkit.monitoring import drift, log, reference
from peftkit.monitoring.drift import Measurements
from peftkit.monitoring.log import Entry

ALL = "all days"


def monitor(
    run: Path,
    folder: Path,
    *,
    file: Path | None = None,
    model: str | None = None,
    level: float = 0.01,
    effect: float = 0.1,
    since: date | None = None,
    until: date | None = None,
) -> dict[str, Any]:
    """Compares a log with a run, as JSON values.

    Args:
        file: texts to compare with in place of the run's validation rows.
        model: name under which the run was served; None takes the only one of the log, or the recipe's.
        level: of all tests together: the chance that any of them tells of a difference where there is none.
        effect: smaller differences are none; see ``drift.Difference.effect``.

    Returns:
        ``run``, ``folder``, ``model``, ``texts``, ``validated``, ``damaged``, ``level``, ``effect``, ``drift``, and
        ``days``: the whole and each day with ``day``, ``texts``, ``seconds`` (median and 95th percentile) and
        ``measures``: the fields of ``drift.Difference`` and ``drift``.

    Raises:
        RunError: not a finished run.
        DataError: there is no such log, none of this model, or no rows to compare with.
    """
    export = open_export(run)
    served = log.read(folder, since=since, until=until)
    name = _name(served, model, export.recipe.name, folder)
    entries = sorted((entry for entry in served.entries if entry.model == name), key=lambda entry: entry.time)
    known = reference.measured(export, file=file, embed=any(entry.embedding for entry in entries))
    by_day = itertools.groupby(entries, lambda entry: entry.time.astimezone(UTC).date().isoformat())
    groups = [(ALL, entries), *((day, list(some)) for day, some in by_day)]
    if len(groups) == 2:
        groups = groups[1:]  # a single day is the whole
    compared = [drift.compare(known, _measurements(some)) for _, some in groups]
    differences = iter(drift.corrected([one for some in compared for one in some]))
    days = []
    for (day, some), raw in zip(groups, compared):
        measures = [
            {**asdict(one), "drift": one.drifted(level, effect)} for one in itertools.islice(differences, len(raw))
        ]
        seconds = np.quantile([entry.seconds for entry in some], [0.5, 0.95])
        days.append({"day": day, "texts": len(some), "seconds": seconds.tolist(), "measures": measures})
    return {
        "run": str(run), "folder": str(folder), "model": name, "texts": len(entries),
        "validated": max((len(values) for values in known.numbers.values()), default=0), "damaged": served.damaged,
        "level": level, "effect": effect, "drift": any(one["drift"] for day in days for one in day["measures"]),
        "days": days,
    }  # fmt: skip


def _name(served: log.Served, wanted: str | None, recipe: str, folder: Path) -> str:
    models = served.models()
    if wanted is None:
        wanted = recipe if recipe in models else models[0] if len(models) == 1 else None
    if wanted is None:
        raise DataError(f"the log has texts of {', '.join(models)}; choose one with --model", file=folder)
    if wanted not in models:
        raise DataError(f"the log has no text of model '{wanted}': {did_you_mean(wanted, models)}", file=folder)
    return wanted


def _measurements(entries: Sequence[Entry]) -> Measurements:
    rows = [entry.model_dump(include={"characters", "tokens", "unknown"}) for entry in entries]
    known = reference.of_rows(rows, [(entry.label, entry.probability) for entry in entries])
    vectors = [vector for entry in entries if (vector := entry.vector()) is not None]
    if len({len(vector) for vector in vectors}) > 1:
        raise DataError("the log has embeddings of several widths; choose days with --since and --until")
    return replace(known, embeddings=np.stack(vectors) if vectors else None)
