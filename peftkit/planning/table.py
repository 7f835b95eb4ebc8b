"""Peak memory of every method and precision on a base model, without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftkit.errors import UserError
from peftkit.planning import machine as machines
from peftkit.planning.devices import Device
from peftkit.planning.plan import PlanInputs, plan_workload
from peftkit.planning.traced_model import Shape
from peftkit.planning.workload import Workload
from peftkit.schema.recipe import Recipe
from peftkit.schema.registries import METHODS, TASKS
from peftkit.schema.types import TaskInfo

PRECISIONS: dict[str, Any] = {"bf16": None, "int8": {"kind": "int8"}, "nf4": {"kind": "nf4", "double": True}}
TOKENS = 512


@dataclass(frozen=True)
class Cell:
    """One method in one precision."""

    method: str
    precision: str
    trained: int = 0
    """Parameters."""
    peak: int = 0
    """Bytes."""
    reason: str = ""
    """Why the method cannot be used, if so."""


def methods_table(source: str, device: Device) -> list[Cell]:
    """Every method with its defaults on one row, for the task that such a base model is usually trained for."""
    from transformers import AutoConfig

    from peftkit.models.context import usable_length
    from peftkit.models.loading import writes_text
    from peftkit.models.meta_model import weight_file_bytes
    from peftkit.models.sources import folder_of, resolve
    from peftkit.models.tokenizer import load_tokenizer
    from peftkit.system.cores import cores

    values = {"name": "table", "model": {"source": source}, "data": {"source": "none.csv"}}
    model = Recipe.parse({**values, "method": "lora"}).model
    folder = folder_of(resolve(model), weights=False)
    tokenizer = load_tokenizer(model)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    decoder = writes_text(config)
    values["task"], info = usual_task(decoder=decoder)
    tokens = usable_length(tokenizer, TOKENS)
    machine = machines.for_device(on_gpu=device.gpu, threads=cores(), decoder=decoder)
    inputs = PlanInputs(tokenizer, info, None, machine, 0, weight_file_bytes(folder))
    shape = Shape(1, tokens, tokens - 1)  # all scored
    workload = Workload((shape,), (shape,), 1, 1, False)
    return [_cell(values, method, each, device, inputs, workload) for method in METHODS.names() for each in PRECISIONS]


def usual_task(*, decoder: bool) -> tuple[str, TaskInfo]:
    """The task that such a base model is usually trained for, with the info of an example."""
    infos = {kind: TASKS.get(kind).example_info(decoder=decoder) for kind in TASKS}
    return next((kind, info) for kind, info in infos.items() if info is not None)


def _cell(
    values: dict[str, Any], method: str, precision: str, device: Device, inputs: PlanInputs, workload: Workload
) -> Cell:
    try:
        recipe = Recipe.parse({**values, "method": method, "quantization": PRECISIONS[precision]})
        plan = plan_workload(recipe, device, inputs, workload)
    except UserError as error:
        return Cell(method, precision, reason=str(error).splitlines()[-1])
    trained = sum(part.parameters for part in plan.parameters if part.trainable)
    return Cell(method, precision, trained, plan.peak.total)
