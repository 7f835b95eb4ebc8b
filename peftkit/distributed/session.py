"""Processes, devices and threads of a run: what was asked for, what really runs, and what is said about it."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.distributed import sharding, zero
from peftkit.distributed.launched import missing_processes
from peftkit.distributed.watchdog import Watchdog, address
from peftkit.errors import PeftkitError, RecipeError, did_you_mean
from peftkit.schema.recipe import Recipe
from peftkit.system.memory import bound_kernel_cache
from peftkit.system.parallel import local_processes, share_of_cores

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

PATIENCE = datetime.timedelta(hours=6)
"""What collectives wait for each other: the main process may download, tokenize or export for longer than gloo's 30 and
NCCL's 10 minutes, and that a process died or hangs is for the watch to notice."""
MIXED_PRECISION = {"torch.float32": "no", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


@dataclass
class Session:
    """One process's view of the run."""

    accelerator: Accelerator
    dtype: torch.dtype
    threads: int
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None
    """The run's folder, once it is known."""
    watchdog: Watchdog = field(init=False)
    """Notices other processes that die or hang, while it is entered."""

    def __post_init__(self) -> None:
        where = address(self.world_size, local_processes())
        self.watchdog = Watchdog(self.rank, self.world_size, self.broadcast_object, address=where)

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """This process's number."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return bool(self.accelerator.is_main_process)

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over the processes."""
        return bool(getattr(self.accelerator, "is_fsdp2", False)) or self.zero

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed's engine makes the steps."""
        return str(getattr(self.accelerator.distributed_type, "value", "")) == "DEEPSPEED"

    def prepare(self, recipe: Recipe, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Module and optimizer as Accelerate wraps them for this run's processes."""
        if self.zero:
            zero.configure(self.accelerator, recipe, module, self.dtype)
        wrapped, prepared = self.accelerator.prepare(module, optimizer)
        return wrapped, prepared

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """A backward pass; of a step's last one DeepSpeed must know, for it then makes the step."""
        if self.zero:
            self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=last)
        else:
            self.accelerator.backward(loss)

    def broadcast_object(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.world_size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        """What the main process's work gives, on every process; an error raised on purpose there is raised on all."""
        if self.world_size == 1:
            return work()
        result = error = None
        if self.is_main:
            try:
                result = work()
            except PeftkitError as raised:
                error = raised
        result, error = self.broadcast_object((result, error))
        if error:
            error.shared = True
            raise error
        return result

    def broadcast_tensors(self, read: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Tensors that the main process reads, on every process's CPU; one after the other is sent."""
        if self.world_size == 1:
            return dict(read())
        import torch

        tensors: dict[str, torch.Tensor] = {}

        def shapes() -> dict[str, Any]:
            tensors.update(read())
            return {name: (held.shape, held.dtype) for name, held in tensors.items()}

        found = {}
        for name, (shape, dtype) in self.run_on_main(shapes).items():
            held = (tensors[name] if self.is_main else torch.empty(shape, dtype=dtype)).to(self.device)
            torch.distributed.broadcast(held, src=0)
            found[name] = held.cpu()
        return found

    def all_reduce_max(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.world_size == 1:
            return value
        import torch

        tensor = torch.tensor([value], device=self.device)
        return int(self.accelerator.gather(tensor).max())

    def start_trackers(self, recipe: Recipe, folder: Path) -> None:
        """Starts the recipe's trackers, told the recipe's fields; their files go into the run's folder."""
        if recipe.tracking:
            configuration = self.accelerator.project_configuration
            configuration.project_dir = configuration.logging_dir = str(folder)
            fields = {
                name: value if isinstance(value, (int, float, str)) else str(value) for name, value in flat(recipe)
            }
            self.accelerator.init_trackers(recipe.name, config=fields)

    def describe(self) -> str:
        """``1 process on cpu, 2 threads, bfloat16``."""
        many = "processes" if self.world_size > 1 else "process"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.world_size} {many} on {self.device.type}, {self.threads} CPU threads each, {dtype}"


def open_session(recipe: Recipe) -> Session:
    """Starts Accelerate, sets the CPU threads and the dtype, and notes what differs from what was asked for."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    from peftkit.models.dtypes import dtype_for
    from peftkit.models.kernels import compile
    from peftkit.training import low_bit_optimizers

    zero.check_installed()
    use_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    device = "cpu" if use_cpu else ("cuda" if torch.cuda.is_available() else "mps")
    dtype = dtype_for(recipe.model, torch.device(device))
    trackers = _trackers(recipe)
    AcceleratorState._reset_state()  # an earlier run of this process (a notebook) may have had another precision
    # told that it is on a CPU, Accelerate would pass DeepSpeed over; told nothing, it would take processes for one
    process_group = InitProcessGroupKwargs(timeout=PATIENCE)
    if use_cpu and zero.asked_for():
        process_group.backend = "gloo"
    accelerator = Accelerator(
        cpu=use_cpu and not zero.asked_for(), mixed_precision=MIXED_PRECISION[str(dtype)], log_with=trackers,
        project_dir=recipe.output_dir, kwargs_handlers=[process_group],
    )  # fmt: skip
    sharding.check(accelerator, recipe)
    if zero.asked_for():
        zero.load_whole()
    threads = share_of_cores(recipe.training.threads)
    torch.set_num_threads(threads)
    bound_kernel_cache()
    set_seed(recipe.training.seed)
    session = Session(accelerator, dtype, threads)
    low_bit_optimizers.check(recipe.training.optimizer, device, sharded=session.sharded)
    if recipe.training.compile:
        compile.check(device, recipe.training.gradient_checkpointing, sharded=session.sharded)
        session.notes.append("blocks are compiled (torch.compile): the first step of each phase takes a while longer")
    note = missing_processes(session.world_size)
    session.notes += [note] if note else []
    if session.sharded:
        said = "parameters are spread over the processes: no texts are generated and no zero-shot classifier is scored"
        session.notes.append(said)
    return session


def flat(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every field of a recipe as (dotted name, plain value)."""

    def walk(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(values, dict) and values:
            for name, value in values.items():
                yield from walk(value, f"{prefix}.{name}" if prefix else name)
        else:
            yield prefix, values

    yield from walk(recipe.model_dump(mode="json"), "")


def _trackers(recipe: Recipe) -> list[str] | None:
    """Accelerate's trackers by name; raises RecipeError for an unknown or missing one, before any work is done."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    installed = {str(name) for name in get_available_trackers()}
    for name in recipe.tracking:
        if name not in known:
            raise RecipeError(f"tracking: unknown tracker '{name}': {did_you_mean(name, known)}")
        if name not in installed:
            raise RecipeError(f"tracking: '{name}' is not installed; `pip install {name}` or tracking=[]")
    return list(recipe.tracking) or None
