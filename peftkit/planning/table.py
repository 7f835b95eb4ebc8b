"""Methods × precisions × memory of one base model, without any data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftkit.errors import UserError
from peftkit.planning import machine as machines
from peftkit.planning.devices import Device
from peftkit.planning.plan import PlanInputs, plan_workload
from peftkit.planning.workload import of_shape
from peftkit.schema.recipe import Recipe
from peftkit.schema.registries import METHODS, TASKS
from peftkit.schema.types import TaskInfo

PRECISIONS: dict[str, Any] = {
    "bf16": None,
    "int8": {"kind": "int8"},
    "nf4": {"kind": "nf4", "double": True},
}


@dataclass(frozen=True)
class Cell:
    """One method in one precision: bytes at the peak, or why not."""

    method: str
    precision: str
    trained: int = 0
    """Trained parameters."""
    peak: int = 0
    reason: str = ""


def table(source: str, device: Device, *, rows: int = 1, tokens: int = 512) -> list[Cell]:
    """Every method with its defaults on a base model; a decoder learns to write, an encoder to classify.

    Raises:
        UserError: the base model cannot be read.
    """
    from transformers import AutoConfig

    from peftkit.models.loading import writes_text
    from peftkit.models.meta_model import weight_file_bytes
    from peftkit.models.sources import folder_of, resolve
    from peftkit.models.tokenizer import load_tokenizer
    from peftkit.system.parallel import cores

    values = {"name": "table", "model": {"source": source}, "data": {"source": "none.csv"}}
    model = Recipe.parse({**values, "method": "lora"}).model
    folder = folder_of(resolve(model), weights=False)
    tokenizer = load_tokenizer(model)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    values["task"], info = _usual_task(decoder=writes_text(config))
    tokens = min(tokens, int(getattr(config, "max_position_embeddings", 0) or tokens))
    known = PlanInputs(tokenizer, info, None, machines.measured(cores()), 0, weight_file_bytes(folder))
    cells = []
    for method in METHODS.names():
        for precision, quantization in PRECISIONS.items():
            given = {**values, "method": method, "quantization": quantization}
            cells.append(_cell(given, method, precision, device, known, of_shape(rows, tokens)))
    return cells


def _usual_task(*, decoder: bool) -> tuple[str, TaskInfo]:
    """What such a base is usually trained for."""
    infos = {kind: TASKS.get(kind).example_info(decoder=decoder) for kind in TASKS}
    return next((kind, info) for kind, info in infos.items() if info is not None)


def _cell(values: dict[str, Any], method: str, precision: str, device: Device, known: PlanInputs, work: Any) -> Cell:
    try:
        plan = plan_workload(Recipe.parse(values), device, known, work)
    except UserError as error:
        return Cell(method, precision, reason=str(error).splitlines()[-1])
    trained = sum(part.parameters for part in plan.parameters if part.trainable)
    return Cell(method, precision, trained, plan.peak.total)
