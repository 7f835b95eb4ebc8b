"""The plan of a finished run compared with what it measured, to show how far a plan can be trusted.

plan.json    {"plan": Plan.to_json(), "beside": [{"figure", "planned", "measured", "off"}, …]}, or {"reason": …}

The plan is made after training, so that it neither delays the start nor counts as memory of the run. Measuring the
machine takes half a minute, which only `peftkit plan` spends on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from peftkit.data.pipeline import EncodedData
from peftkit.planning import machine as machines
from peftkit.planning.machine import Machine
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe, replace
from peftkit.schema.types import TaskInfo

if TYPE_CHECKING:
    from peftkit.planning.plan import Plan

FILE = "plan.json"


def compare_with_measured(
    recipe: Recipe, info: TaskInfo, tokenizer: Any, encoded: EncodedData, metrics: Mapping[str, Any], *, device: Any,
    world_size: int = 1, sharded: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The plan of a run and its measurements, for ``plan.json``.

    Args:
        metrics: of training: ``seconds``, ``peak_memory_bytes``, ``micro_batch``.
        device: the run's ``torch.device``.
        sharded: whether its weights were sharded over processes, which is not planned.
    """
    from peftkit.system.cores import cores

    threads = recipe.training.threads or cores()
    if sharded:
        return {"reason": "sharded weights are not planned"}
    decoder = head_of(info, recipe.task).writes_text
    on_gpu = device.type == "cuda"
    if not on_gpu and not machines.is_measured(threads, decoder=decoder):
        return {"reason": "this machine has not been measured; run `peftkit plan` once"}
    try:
        machine = machines.for_device(on_gpu=on_gpu, threads=threads, decoder=decoder)
        plan = _plan(recipe, info, tokenizer, encoded, metrics, device, world_size, machine)
    except Exception as error:  # an architecture that cannot be traced must not fail a finished run
        return {"reason": f"{recipe.model.source} could not be planned: {type(error).__name__}: {error}"}
    peak = int(metrics["peak_memory_bytes"])
    if on_gpu:  # the allocator's blocks and the context
        peak = int(torch.cuda.max_memory_reserved(device)) + machine.framework_bytes
    rows = [("peak_memory_bytes", plan.peak.total, peak), ("seconds", plan.training_seconds, metrics["seconds"])]
    columns = ("figure", "planned", "measured", "off")
    beside = [(name, planned, value, planned / value - 1 if value else None) for name, planned, value in rows]
    return {"plan": plan.to_json(), "beside": [dict(zip(columns, row)) for row in beside]}


def planned_metrics(comparison: Mapping[str, Any]) -> dict[str, float]:
    """``planned_peak_memory_bytes`` and ``planned_seconds``, for ``metrics.json``."""
    return {f"planned_{row['figure']}": row["planned"] for row in comparison.get("beside", [])}


def _plan(
    recipe: Recipe, info: TaskInfo, tokenizer: Any, encoded: EncodedData, metrics: Mapping[str, Any], device: Any,
    world_size: int, machine: Machine,
) -> Plan:  # fmt: skip
    from peftkit.models.architectures import READS_PADDING
    from peftkit.models.meta_model import weight_file_bytes
    from peftkit.models.sources import check_config, folder_of, resolve
    from peftkit.planning.devices import local_device
    from peftkit.planning.plan import PlanInputs, plan_workload
    from peftkit.planning.workload import data_workload

    recipe = replace(recipe, training={"micro_batch": metrics.get("micro_batch")})
    tables = sum(int(split.examples.data.nbytes) for split in encoded.splits.values())
    folder = folder_of(resolve(recipe.model), weights=False)
    files, unpadded = weight_file_bytes(folder), check_config(folder).get("model_type") in READS_PADDING
    inputs = PlanInputs(tokenizer, info, encoded, machine, tables, files, unpadded)
    workload = data_workload(
        recipe, encoded, device.type, world_size=world_size, unpadded=unpadded,
        compares_rows=head_of(info, recipe.task).compares_rows,
    )  # fmt: skip
    return plan_workload(recipe, local_device(gpu=device.type == "cuda"), inputs, workload)
