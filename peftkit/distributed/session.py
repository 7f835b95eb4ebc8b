"""The processes, devices, dtype and threads of a training run, on top of Accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.distributed import sharding, zero
from peftkit.distributed.launched import missing_processes
from peftkit.distributed.process_group import COLLECTIVE_TIMEOUT, ProcessGroup
from peftkit.errors import PeftkitError, RecipeError, did_you_mean
from peftkit.schema.recipe import Recipe, flatten
from peftkit.system.cores import share_of_cores
from peftkit.system.memory import bound_kernel_cache

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from peftkit.schema.types import Batch

MIXED_PRECISION = {"torch.float32": "no", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


class Session(ProcessGroup):
    """One process's view of a training run.

    Failures of the machine (a full disk, no memory) are raised here only, and the watchdog ends the other processes.
    """

    device: torch.device
    shared_errors = PeftkitError

    def __init__(self, accelerator: Accelerator, dtype: torch.dtype, threads: int) -> None:
        super().__init__(int(accelerator.process_index), int(accelerator.num_processes), accelerator.device)
        self.accelerator, self.dtype, self.threads = accelerator, dtype, threads
        self._zero = sharding.strategy(accelerator) == sharding.DEEPSPEED
        self.sharded = self._zero or bool(getattr(accelerator, "is_fsdp2", False))
        self.notes: list[str] = []
        self.folder: Path | None = None
        """The run's folder, once it is known."""
        self.watchdog = self.new_watchdog()

    def prepare(self, recipe: Recipe, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Module and optimizer as Accelerate wraps them for this run's processes."""
        if self._zero:
            zero.configure(self.accelerator, recipe, module, self.dtype)
        if recipe.model.offload is None:
            return self.accelerator.prepare(module, optimizer)  # type: ignore[no-any-return]
        # everything is where it belongs, and DDP must neither move nor compare what is offloaded
        module._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            name for name, parameter in module.named_parameters() if not parameter.requires_grad
        ]
        return self.accelerator.prepare(module, optimizer, device_placement=[False, False])  # type: ignore[no-any-return]

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Runs a backward pass; in a step's last one DeepSpeed also makes the optimizer step."""
        if self._zero:
            self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=last)
        else:
            self.accelerator.backward(loss)

    def on_device(self, batch: Batch) -> Batch:
        """The batch's tensors on this process's device."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def start_trackers(self, recipe: Recipe, folder: Path) -> None:
        """Starts the recipe's trackers with the recipe's fields; their files go into the run's folder."""
        if recipe.tracking:
            configuration = self.accelerator.project_configuration
            configuration.project_dir = configuration.logging_dir = str(folder)
            plain = (int, float, str)
            fields = {name: v if isinstance(v, plain) else str(v) for name, v in flatten(recipe).items()}
            self.accelerator.init_trackers(recipe.name, config=fields)

    def describe(self) -> str:
        """``1 process on cpu, 2 CPU threads each, bfloat16``."""
        noun = "processes" if self.world_size > 1 else "process"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.world_size} {noun} on {self.device.type}, {self.threads} CPU threads each, {dtype}"


def open_session(recipe: Recipe) -> Session:
    """Starts Accelerate, sets CPU threads and dtype, and notes where less is available than was requested.

    Raises:
        RecipeError: an unknown tracker, or a sharding strategy that cannot train this recipe.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    from peftkit.models.dtypes import dtype_for

    zero.check_installed()
    use_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    device = "cpu" if use_cpu else ("cuda" if torch.cuda.is_available() else "mps")
    dtype = dtype_for(recipe.model, torch.device(device))
    trackers = _check_trackers(recipe)
    AcceleratorState._reset_state()  # an earlier run of this process (a notebook) may have had another precision
    # with cpu=True Accelerate would ignore DeepSpeed; without a backend it would start a single process
    process_group = InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)
    if use_cpu and zero.is_requested():
        process_group.backend = "gloo"
    accelerator = Accelerator(
        cpu=use_cpu and not zero.is_requested(), mixed_precision=MIXED_PRECISION[str(dtype)], log_with=trackers,
        project_dir=recipe.output_dir, kwargs_handlers=[process_group],
    )  # fmt: skip
    sharding.check(accelerator, recipe)
    if zero.is_requested():
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # transformers would load partitioned weights, but methods need full ones
    threads = share_of_cores(recipe.training.threads)
    torch.set_num_threads(threads)
    bound_kernel_cache()
    set_seed(recipe.training.seed)
    session = Session(accelerator, dtype, threads)
    if note := missing_processes(session.world_size):
        session.notes.append(note)
    if session.sharded:
        skipped = "generation samples and the zero-shot baseline are skipped"
        session.notes.append(f"the model is sharded over the processes: {skipped}")
    return session


def _check_trackers(recipe: Recipe) -> list[str] | None:
    """The recipe's trackers as Accelerate takes them; raises RecipeError for one that is unknown or not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    installed = {str(name) for name in get_available_trackers()}
    for name in recipe.tracking:
        if name not in known:
            raise RecipeError(f"tracking: unknown tracker '{name}': {did_you_mean(name, known)}")
        if name not in installed:
            raise RecipeError(f"tracking: '{name}' is not installed; run `pip install {name}`, or set tracking=[]")
    return list(recipe.tracking) or None
