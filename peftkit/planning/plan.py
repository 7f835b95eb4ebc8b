"""The plan of a run: what is trained, what it takes in memory and time, and whether it fits.

plan = make_plan(recipe)                 # on the device that is here
plan = make_plan(recipe, named("8GB"))   # on another
plan.peak.total, plan.fits, plan.seconds
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import psutil

from peftkit.models import dtypes
from peftkit.models.inventory import TablePart, trainable_table
from peftkit.models.meta_model import build_meta_model, weight_file_bytes
from peftkit.models.sources import folder_of, resolve
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning import machine as machines
from peftkit.planning.devices import Device, here
from peftkit.planning.machine import Machine
from peftkit.planning.memory import Held, Phase, held_by, phases
from peftkit.planning.trace import Traced, fake_tensor_mode
from peftkit.planning.traced_model import Shape, TracedModel
from peftkit.planning.workload import Workload, of_data
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import TaskInfo
from peftkit.system.memory import KERNELS


@dataclass(frozen=True)
class Plan:
    """Figures of a run that has not begun."""

    recipe: Recipe
    device: Device
    dtype: str
    parameters: tuple[TablePart, ...]
    phases: tuple[Phase, ...]
    held: Held
    workload: Workload
    flops_a_token: float
    """Products of forward and backward, a real token."""
    training_seconds: float
    """Estimate of all steps, as a run counts its own."""
    evaluation_seconds: float
    """Estimate of the validations."""
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def seconds(self) -> float:
        """Estimate of training and its validations."""
        return self.training_seconds + self.evaluation_seconds

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the device's memory."""
        return self.peak.total <= self.device.memory

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        largest = self.workload.largest
        return {
            "name": self.recipe.name,
            "device": asdict(self.device),
            "dtype": self.dtype,
            "parameters": [asdict(part) for part in self.parameters],
            "phases": [{"name": phase.name, "parts": phase.parts, "bytes": phase.total} for phase in self.phases],
            "peak": {"phase": self.peak.name, "bytes": self.peak.total},
            "fits": self.fits,
            "steps": self.workload.steps,
            "largest_pass": {"rows": largest.rows, "tokens": largest.tokens, "scored": largest.scored},
            "flops_a_token": self.flops_a_token,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class PlanInputs:
    """What planning needs besides the recipe, found once for all changes of it."""

    tokenizer: Any
    info: TaskInfo
    encoded: Any
    machine: Machine
    loader_bytes: int
    file_bytes: int

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents."""
        return "position_ids" in self.encoded.splits["train"].examples.column_names


def collect_inputs(recipe: Recipe) -> PlanInputs:
    """Reads tokenizer, data and machine; no weight is loaded."""
    import accelerate
    import datasets

    from peftkit.data.pipeline import encode, prepare
    from peftkit.evaluation import decisions
    from peftkit.system.parallel import cores
    from peftkit.training import loop

    taken = (accelerate, datasets, decisions, loop)  # counted as the framework's; what grows from here on is the data's
    assert all(taken)
    machine = machines.measured(recipe.training.threads or cores())
    before = psutil.Process().memory_info().rss
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe)
    encoded = encode(prepared, tokenizer, recipe)
    grown = max(0, psutil.Process().memory_info().rss - before)
    files = weight_file_bytes(folder_of(resolve(recipe.model), weights=False))
    return PlanInputs(tokenizer, prepared.info, encoded, machine, grown, files)


def make_plan(recipe: Recipe, device: Device | None = None, known: PlanInputs | None = None) -> Plan:
    """The plan of a recipe.

    Args:
        device: where it is to run; None takes what is here.
        known: what an earlier plan on the same data has read.

    Raises:
        UserError: the recipe, its data or its base model are wrong, as a run would say it.
    """
    dtypes.silence_libraries()
    known, device = known or collect_inputs(recipe), device or here()
    workload = of_data(recipe, known.encoded, "cuda" if device.gpu else "cpu", packed=known.packed)
    return plan_workload(recipe, device, known, workload)


def plan_workload(recipe: Recipe, device: Device, known: PlanInputs, workload: Workload) -> Plan:
    """The plan of given passes."""
    import torch

    dtype = planned_dtype(recipe, device)
    machine = machines.of_gpu(known.machine) if device.gpu else known.machine
    with fake_tensor_mode():
        loaded = build_meta_model(recipe, known.info, known.tokenizer, dtype, gpu=device.gpu)
        subject = TracedModel(loaded, head_of(known.info, recipe.task), dtype, device.gpu)
        held = held_by(loaded.model, recipe.training.optimizer, averaged=bool(recipe.training.weight_averaging))
        parameters = tuple(trainable_table(loaded.model))
        train = subject.train(workload.largest, 2 if workload.accumulates else 1)
        evaluation = subject.evaluate(workload.largest_evaluation)
        training, validations, flops = _time(subject, workload, train, evaluation, machine)
    found = phases(
        held, train, evaluation, ratio=1.0 if device.gpu else machine.allocator_ratio, gpu=device.gpu,
        framework=machine.cuda_bytes if device.gpu else machine.framework_bytes,
        loader=0 if device.gpu else known.loader_bytes, file=known.file_bytes,
        kernels=0 if dtype != torch.bfloat16 else int(_kernels(workload, train, evaluation) * machine.kernel_bytes),
    )  # fmt: skip
    notes = _notes(recipe, device, torch.cuda.is_available())
    shown = str(dtype).removeprefix("torch.")
    return Plan(recipe, device, shown, parameters, found, held, workload, flops, training, validations, notes)


def _kernels(workload: Workload, train: Traced, evaluation: Traced) -> int:
    """How many kernels the passes of a run have oneDNN keep: those of every shape of pass, up to its bound."""
    trained, evaluated = ({(s.rows, s.tokens) for s in made} for made in (workload.train, workload.evaluation))
    made = train.kernels * len(trained) + evaluation.kernels * len(evaluated - trained)
    return min(KERNELS, made)


def pass_bytes(recipe: Recipe, info: TaskInfo, tokenizer: Any, dtype: Any, shape: Shape) -> int:
    """Bytes that training takes on a CPU beside the model that is loaded: a pass, gradients and optimizer states."""
    from peftkit.system.parallel import cores

    machine = machines.measured(recipe.training.threads or cores())
    with fake_tensor_mode():
        loaded = build_meta_model(recipe, info, tokenizer, dtype)
        subject = TracedModel(loaded, head_of(info, recipe.task), dtype)
        held = held_by(subject.loaded.model, recipe.training.optimizer)
        return sum(subject.train(shape, 2).resident(machine.allocator_ratio).values()) + held.states


def planned_dtype(recipe: Recipe, device: Device) -> Any:
    """The dtype of frozen weights there: a GPU that is only named is taken to have bf16."""
    import torch

    if device.gpu and recipe.model.dtype == "auto" and not torch.cuda.is_available():
        return torch.bfloat16
    return dtypes.dtype_for(recipe.model, "cuda" if device.gpu else "cpu")


def _time(
    subject: TracedModel, workload: Workload, train: Traced, evaluation: Traced, machine: Machine
) -> tuple[float, float, float]:
    """(seconds of all steps, of all validations, products a real token): a row costs a·tokens + b·tokens²."""
    largest = workload.largest
    half = Shape(largest.rows, max(2, largest.tokens // 2), max(1, largest.scored // 2), largest.packed)
    small = subject.train(half)

    def cost(shape: Shape) -> tuple[float, float]:
        return tuple(  # type: ignore[return-value]
            shape.rows * _quadratic(shape.tokens, (half.tokens, low / half.rows), (largest.tokens, high / largest.rows))
            for low, high in ((small.flops, train.flops), (small.moved, train.moved))
        )

    costs = [cost(shape) for shape in workload.train]
    flops, moved = sum(c[0] for c in costs), sum(c[1] for c in costs)
    seconds = machine.seconds(flops, moved, train.operators * len(workload.train)) * workload.epochs
    first = workload.largest_evaluation
    share = sum(s.rows * s.tokens for s in workload.evaluation) / (first.rows * first.tokens)
    calls = evaluation.operators * len(workload.evaluation)
    once = machine.seconds(evaluation.flops * share, evaluation.moved * share, calls)
    return seconds, once * max(1.0, workload.epochs), flops / sum(shape.rows * shape.tokens for shape in workload.train)


def _quadratic(at: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    """Through the origin and two points."""
    if low[0] == high[0]:
        return high[1] * at / high[0]
    slope = (high[1] / high[0] - low[1] / low[0]) / (high[0] - low[0])
    return at * (low[1] / low[0] + slope * (at - low[0]))


def _notes(recipe: Recipe, device: Device, has_gpu: bool) -> tuple[str, ...]:
    notes = []
    if device.gpu and not has_gpu:
        notes.append("no GPU is here: its context is taken as 0.5 GB, and times serve to compare plans with each other")
    if not recipe.method.adapts_backbone and recipe.training.feature_cache_gb:
        notes.append("features of the frozen backbone are kept after the first epoch: the time is an upper bound")
    if recipe.training.optimizer.startswith("paged"):
        notes.append("paged optimizer states are counted in full; where memory is short they move out of it")
    if recipe.training.compile:
        notes.append("planned as if not compiled: what the compiler keeps, and the minute it takes, are not in it")
    return tuple(notes)
