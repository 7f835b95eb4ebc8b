"""A run that is over beside its plan, made from the recipe and lengths that it had: how far a plan can be trusted.

plan.json    {"plan": Plan.to_json(), "beside": [{"figure", "planned", "measured", "off"}, …]}, or {"reason": …}

The plan is made when training is done: it costs the start nothing, and its own memory is not measured with the run's.
Where this machine has not been measured yet, which takes half a minute, only a long run does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftkit.data.pipeline import EncodedData
from peftkit.planning import machine as machines
from peftkit.schema.recipe import Recipe, replace
from peftkit.schema.types import TaskInfo

if TYPE_CHECKING:
    from peftkit.planning.plan import Plan

FILE = "plan.json"
LONG = 300.0
"""Seconds of training from which on half a minute more is spent on measuring the machine."""


def compare_with_measured(
    recipe: Recipe, info: TaskInfo, tokenizer: Any, encoded: EncodedData, found: Mapping[str, Any], *, device: Any,
    world_size: int = 1, sharded: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The plan of a run and the figures that were measured of it, for ``plan.json``.

    Args:
        found: the run's figures of training: ``seconds``, ``peak_memory_bytes``, ``micro_batch``.
        device: where it ran, ``torch.device``.
        sharded: whether its weights were spread over processes, which is not planned.
    """
    from peftkit.system.parallel import cores

    threads = recipe.training.threads or cores()
    if sharded:
        return {"reason": "weights spread over processes are not planned"}
    if not machines.is_measured(threads) and found["seconds"] < LONG:
        return {"reason": "this machine has not been measured; `peftkit plan` does it, once"}
    try:
        plan = _plan(recipe, info, tokenizer, encoded, found, device, world_size, threads)
    except Exception as error:  # whatever an architecture does to a trace: a run that is over is not lost by its plan
        return {"reason": f"{recipe.model.source} could not be planned: {type(error).__name__}: {error}"}
    measured = _peak(device, found, threads)
    rows = [("peak_memory_bytes", plan.peak.total, measured), ("seconds", plan.training_seconds, found["seconds"])]
    return {
        "plan": plan.to_json(),
        "beside": [
            {"figure": name, "planned": planned, "measured": value, "off": planned / value - 1 if value else None}
            for name, planned, value in rows
        ],
    }


def plan_error_metrics(made: Mapping[str, Any]) -> dict[str, float]:
    """The planned figures for ``metrics.json``: ``planned_peak_memory_bytes`` and ``planned_seconds``."""
    return {f"planned_{row['figure']}": row["planned"] for row in made.get("beside", [])}


def _plan(
    recipe: Recipe, info: TaskInfo, tokenizer: Any, encoded: EncodedData, found: Mapping[str, Any], device: Any,
    world_size: int, threads: int,
) -> Plan:  # fmt: skip
    from peftkit.models.meta_model import weight_file_bytes
    from peftkit.models.sources import folder_of, resolve
    from peftkit.planning.devices import here
    from peftkit.planning.plan import PlanInputs, plan_workload
    from peftkit.planning.workload import of_data

    chosen = replace(recipe, training={"micro_batch": found.get("micro_batch")})
    tables = sum(int(split.examples.data.nbytes) for split in encoded.splits.values())
    files = weight_file_bytes(folder_of(resolve(recipe.model), weights=False))
    known = PlanInputs(tokenizer, info, encoded, machines.measured(threads), tables, files)
    work = of_data(chosen, encoded, device.type, packed=known.packed, world_size=world_size)
    return plan_workload(chosen, here(gpu=device.type == "cuda"), known, work)


def _peak(device: Any, found: Mapping[str, Any], threads: int) -> int:
    """What the device that is planned for has held at most: of a GPU, the allocator's blocks and the context."""
    if device.type != "cuda":
        return int(found["peak_memory_bytes"])
    import torch

    return int(torch.cuda.max_memory_reserved(device)) + machines.measured(threads).cuda_bytes
