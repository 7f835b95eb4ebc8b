"""The plan of a run: what is trained, its memory and time, and whether it fits a device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from peftkit.models import dtypes, offload
from peftkit.models.architectures import READS_PADDING
from peftkit.models.inventory import TablePart, trainable_table
from peftkit.models.meta_model import build_meta_model, weight_file_bytes
from peftkit.models.sources import check_config, folder_of, resolve
from peftkit.models.third_party import silence_libraries
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning import machine as machines
from peftkit.planning.devices import Device, format_bytes, local_device
from peftkit.planning.machine import Machine
from peftkit.planning.memory import PersistentMemory, Phase, persistent_memory, plan_phases
from peftkit.planning.offloading import RATES, OffloadedBlocks, offloaded_blocks
from peftkit.planning.trace import Trace, fake_tensor_mode
from peftkit.planning.traced_model import Shape, TracedModel
from peftkit.planning.workload import Workload, data_workload
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import TaskInfo
from peftkit.system.cores import cores
from peftkit.system.memory import KERNELS


@dataclass(frozen=True)
class Plan:
    """Memory and time of a run, estimated beforehand."""

    recipe: Recipe
    device: Device
    dtype: str
    parameters: tuple[TablePart, ...]
    phases: tuple[Phase, ...]
    persistent: PersistentMemory
    workload: Workload
    flops_per_token: float
    """Matmul FLOPs of forward and backward, per token without padding."""
    training_seconds: float
    """Of all steps, as a run counts its own."""
    evaluation_seconds: float
    """Of all validations."""
    notes: tuple[str, ...] = ()
    offloaded: OffloadedBlocks | None = None
    """What ``model.offload`` keeps off the device."""

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def seconds(self) -> float:
        """Of training and its validations."""
        return self.training_seconds + self.evaluation_seconds

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.device.memory

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
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
            "flops_a_token": self.flops_per_token,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "notes": list(self.notes),
            "offloaded": None if self.offloaded is None else asdict(self.offloaded),
        }


@dataclass(frozen=True)
class PlanInputs:
    """What planning needs besides the recipe, collected once for all variants of it."""

    tokenizer: Any
    info: TaskInfo
    encoded: Any
    machine: Machine
    loader_bytes: int
    file_bytes: int
    unpadded: bool = False
    """Whether micro-batches have rows of one length."""


def collect_inputs(recipe: Recipe, device: Device) -> PlanInputs:
    """Load tokenizer and data, and measure the machine if the device is its CPU; no weights are loaded."""
    from peftkit.data.pipeline import encode, prepare
    from peftkit.data.source import find_sources

    find_sources(recipe.data)
    machines.import_libraries()
    before = psutil.Process().memory_info().rss
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe)
    encoded = encode(prepared, tokenizer, recipe)
    loader = max(0, psutil.Process().memory_info().rss - before)
    folder = folder_of(resolve(recipe.model), weights=False)
    files, unpadded = weight_file_bytes(folder), check_config(folder).get("model_type") in READS_PADDING
    decoder = head_of(prepared.info, recipe.task).writes_text
    threads = recipe.training.threads or cores()
    machine = machines.for_device(on_gpu=device.gpu, threads=threads, decoder=decoder)
    return PlanInputs(tokenizer, prepared.info, encoded, machine, loader, files, unpadded)


def make_plan(recipe: Recipe, device: Device | None = None, inputs: PlanInputs | None = None) -> Plan:
    """The plan of a recipe on a device (default: this machine's), with the inputs of an earlier plan of the same data.

    Raises:
        UserError: the recipe, its data or its base model are wrong; the errors are those of a run.
    """
    silence_libraries()
    device = device or local_device()
    inputs = inputs or collect_inputs(recipe, device)
    workload = data_workload(
        recipe, inputs.encoded, "cuda" if device.gpu else "cpu", unpadded=inputs.unpadded,
        compares_rows=head_of(inputs.info, recipe.task).compares_rows,
    )  # fmt: skip
    return plan_workload(recipe, device, inputs, workload)


def plan_workload(recipe: Recipe, device: Device, inputs: PlanInputs, workload: Workload) -> Plan:
    """The plan of a recipe with given micro-batches."""
    offload.check(recipe.model, "cuda" if device.gpu else "cpu")
    # without a GPU here, the planned one is assumed to have bf16
    assumed = device.gpu and recipe.model.dtype == "auto" and not torch.cuda.is_available()
    dtype = torch.bfloat16 if assumed else dtypes.dtype_for(recipe.model, "cuda" if device.gpu else "cpu")
    machine = machines.gpu() if device.gpu else inputs.machine
    with fake_tensor_mode():
        loaded = build_meta_model(recipe, inputs.info, inputs.tokenizer, dtype, gpu=device.gpu)
        model = TracedModel(loaded, head_of(inputs.info, recipe.task), dtype, device.gpu)
        averaged, config = bool(recipe.training.weight_averaging), recipe.model.offload
        offloaded = offloaded_blocks(loaded, config) if config is not None else None
        persistent = persistent_memory(loaded.model, recipe.training.optimizer, averaged=averaged, offloaded=offloaded)
        parameters = tuple(trainable_table(loaded.model))
        train = model.train(workload.largest, 2 if workload.accumulates else 1)
        evaluation = model.evaluate(workload.largest_evaluation)
        times = _estimate_times(model, workload, train, evaluation, machine, offloaded)
    phases = plan_phases(
        persistent, train, evaluation, ratio=machine.allocator_ratio, gpu=device.gpu,
        framework=machine.framework_bytes,
        loader=0 if device.gpu else inputs.loader_bytes, file=inputs.file_bytes,
        kernels=0 if dtype != torch.bfloat16 else int(_kernels(workload, train, evaluation) * machine.kernel_bytes),
    )  # fmt: skip
    notes = _notes(recipe, device, torch.cuda.is_available(), offloaded)
    name = str(dtype).removeprefix("torch.")
    return Plan(recipe, device, name, parameters, phases, persistent, workload, *times, notes, offloaded)


def _kernels(workload: Workload, train: Trace, evaluation: Trace) -> int:
    """Number of kernels that oneDNN caches for all shapes of micro-batches, up to its limit."""
    trained, evaluated = ({(s.rows, s.tokens) for s in shapes} for shapes in (workload.train, workload.evaluation))
    return min(KERNELS, train.kernels * len(trained) + evaluation.kernels * len(evaluated - trained))


def micro_batch_bytes(recipe: Recipe, info: TaskInfo, tokenizer: Any, dtype: Any, shape: Shape) -> int:
    """Bytes that training with micro-batches of that shape needs on a CPU, in addition to the loaded model."""
    decoder = head_of(info, recipe.task).writes_text
    machine = machines.measure(recipe.training.threads or cores(), decoder=decoder)
    with fake_tensor_mode():
        loaded = build_meta_model(recipe, info, tokenizer, dtype)
        model = TracedModel(loaded, head_of(info, recipe.task), dtype)
        states = persistent_memory(loaded.model, recipe.training.optimizer).states
        return sum(model.train(shape, 2).resident(machine.allocator_ratio).values()) + states


def _estimate_times(
    model: TracedModel, workload: Workload, train: Trace, evaluation: Trace, machine: Machine,
    offloaded: OffloadedBlocks | None,
) -> tuple[float, float, float]:  # fmt: skip
    """FLOPs per token, seconds of all steps, and of all validations; a row costs a·tokens + b·tokens²."""
    largest = workload.largest
    half = Shape(largest.rows, max(2, largest.tokens // 2), max(1, largest.scored // 2), largest.packed)
    small = model.train(half)

    def total(low: int, high: int) -> float:
        """Cost of an epoch, from those of the two traced shapes."""
        points = (half.tokens, low / half.rows), (largest.tokens, high / largest.rows)
        return sum(shape.rows * _quadratic(shape.tokens, *points) for shape in workload.train)

    flops, moved = total(small.flops, train.flops), total(small.moved, train.moved)
    seconds = machine.seconds(flops, moved, train.operators * len(workload.train))
    tokens = sum(shape.padded_tokens for shape in workload.train)
    share = sum(shape.padded_tokens for shape in workload.evaluation) / workload.largest_evaluation.padded_tokens
    calls = evaluation.operators * len(workload.evaluation)
    validation = machine.seconds(evaluation.flops * share, evaluation.moved * share, calls)
    if offloaded is not None:  # copies run next to computations
        reading, reading_evaluation = offloaded.seconds(len(workload.train), len(workload.evaluation))
        seconds, validation = max(seconds, reading), max(validation, reading_evaluation)
    return flops / tokens, seconds * workload.epochs, validation * max(1.0, workload.epochs)


def _quadratic(at: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    """The value at a point of the parabola through the origin and two points."""
    if low[0] == high[0]:
        return high[1] * at / high[0]
    slope = (high[1] / high[0] - low[1] / low[0]) / (high[0] - low[0])
    return at * (low[1] / low[0] + slope * (at - low[0]))


def _notes(recipe: Recipe, device: Device, has_gpu: bool, offloaded: OffloadedBlocks | None) -> tuple[str, ...]:
    notes = []
    if offloaded is not None:
        place = "the CPU's memory" if offloaded.to == "cpu" else "files"
        reading, _ = offloaded.seconds(1, 0)
        notes.append(
            f"{format_bytes(offloaded.forward)} of frozen blocks are in {place}; a micro-batch reads "
            f"{format_bytes(offloaded.forward + offloaded.backward)}, {reading:.2g} s at an assumed "
            f"{RATES[offloaded.to] / 1e9:g} GB/s, next to its computations"
        )
    if device.gpu and not has_gpu:
        notes.append("no GPU was measured: its context is assumed to take 0.5 GB, and times only compare plans")
    if not recipe.method.adapts_backbone and recipe.training.feature_cache_gb:
        notes.append("features of the frozen backbone are cached after the first epoch: the time is an upper bound")
    if recipe.training.optimizer.startswith("paged"):
        notes.append("paged optimizer states are counted in full, but move to the CPU when memory is short")
    for name, value in recipe.method.automatic().items():
        notes.append(
            f"method.{name}=auto: the run chooses {value.span} on up to {value.rows} training rows; this plan is for "
            "the most"
        )
    if recipe.training.compile:
        notes.append("planned as not compiled: the compiler's memory and its first minute are not included")
    return tuple(notes)
