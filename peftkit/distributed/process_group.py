"""The processes of one job: work done by the main one, work shared by all, and errors raised on all.

Every method that takes ``work`` is a collective, and an error on one process is raised on all. A process that is killed
or hangs is reported by the watchdog. Training's ``Session`` is such a group.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from peftkit.distributed.launched import missing_processes
from peftkit.distributed.watchdog import Watchdog
from peftkit.errors import PeftkitError, RunError, TrainingError
from peftkit.system.cores import local_processes, share_of_cores

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher sets besides WORLD_SIZE."""
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=6)
"""The defaults (gloo 30 minutes, NCCL 10) are too short where the main process downloads, tokenizes or exports; the
watchdog notices processes that die or hang."""


@dataclass
class ProcessGroup:
    """One process's view of its job; a group of one communicates nothing."""

    rank: int = 0
    world_size: int = 1
    device: Any = None
    """This process's device; None leaves the choice to whoever loads the model."""

    shared_errors: ClassVar[type[Exception]] = Exception
    """Errors that are raised on all processes. After any other, the watchdog ends the processes that wait."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def run_collectively(self, work: Callable[[], Result]) -> Result:
        """Runs ``work`` on every process; returns its result here, or raises the first error when all are done."""
        if self.world_size == 1:
            return work()
        result, own = self._attempt(work)
        for rank, error in enumerate(self.all_gather_object(own)):
            if error is not None:
                error = own if own and rank == self.rank else error
                error.shared = True
                error.args = (f"rank {rank}: {error}" if rank else str(error), *error.args[1:])
                raise error
        return result  # type: ignore[return-value]

    def run_on_main(self, work: Callable[[], Result]) -> Result:
        """Runs ``work`` on the main process and returns its result, or raises its error, on every process."""
        if self.world_size == 1:
            return work()
        result, error = self.broadcast_object(self._attempt(work) if self.is_main else None)
        if error:
            error.shared = True
            raise error
        return result  # type: ignore[no-any-return]

    def main_first(self, work: Callable[[], Result]) -> Result:
        """Runs ``work`` on every process; the others start once the main one has filled the caches."""
        if not self.is_main:
            self.run_collectively(lambda: None)
        result = self.run_collectively(work)
        if self.is_main:
            self.run_collectively(lambda: None)
        return result

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """Runs ``work`` on every process and returns all results by rank, on every process."""
        return self.all_gather_object(self.run_collectively(work))

    def map_sharded(self, items: Sequence[Item], work: Callable[[list[Item]], Iterable[Result]]) -> list[Result]:
        """Applies ``work``, which maps a list to as many results, to all items; all results are on every process."""
        if self.world_size == 1:
            return list(work(list(items)))
        own = list(items[self.rank :: self.world_size])
        results: list[Any] = [None] * len(items)
        for rank, shard in enumerate(self.gather(lambda: list(work(own)) if own else [])):
            results[rank :: self.world_size] = shard  # raises ValueError unless there is one result per item
        return results

    def chunks(self, rows: Iterator[Item], size: int) -> Iterator[list[Item]]:
        """Yields the rows that the main process reads, on every process: at most ``size`` per process at a time."""
        while chunk := self.run_on_main(lambda: list(itertools.islice(rows, size * self.world_size))):
            yield chunk

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every process's value by rank, on every process."""
        values = [value] * self.world_size
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_gather_object(values, value)
        return values

    def all_gather_rows(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every process's tensor by rank, on every process; their first dimensions may differ."""
        if self.world_size == 1:
            return [tensor]
        import torch

        sizes = self.all_gather_object(len(tensor))
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(gathered, padded)
        return [rows[:size] for rows, size in zip(gathered, sizes)]

    def broadcast_object(self, value: Any) -> Any:
        """The main process's value, on every process."""
        values = [value]
        if self.world_size > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(values, src=0)
        return values[0]

    def broadcast_tensors(self, read: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors that ``read`` returns on the main process, on every process's CPU; sent one at a time."""
        if self.world_size == 1:
            return dict(read())
        import torch

        tensors: dict[str, torch.Tensor] = {}

        def read_shapes() -> dict[str, Any]:
            tensors.update(read())
            return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

        for name, (shape, dtype) in self.run_on_main(read_shapes).items():
            tensor = (tensors[name] if self.is_main else torch.empty(shape, dtype=dtype)).to(self.device)
            torch.distributed.broadcast(tensor, src=0)
            tensors[name] = tensor.cpu()
        return tensors

    def all_reduce_max(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.world_size == 1:
            return value
        import torch

        tensor = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def new_watchdog(self, **options: Any) -> Watchdog:
        """A watchdog over the group's processes, which meet on the loopback unless there are several machines."""
        several_machines = local_processes() < self.world_size
        address = os.environ.get("MASTER_ADDR", "127.0.0.1") if several_machines else "127.0.0.1"
        return Watchdog(self.rank, self.world_size, self.broadcast_object, address=address, **options)

    def _attempt(self, work: Callable[[], Result]) -> tuple[Result | None, PeftkitError | None]:
        """The result of ``work``, or its error as one that every process can raise."""
        try:
            return work(), None
        except self.shared_errors as raised:
            if isinstance(raised, PeftkitError):
                return None, raised
            error = TrainingError(f"{type(raised).__name__}: {raised}")
            error.__cause__ = raised
            return None, error


@contextlib.contextmanager
def init_process_group() -> Iterator[ProcessGroup]:
    """Connects the launched processes while a command runs; without a launcher, a group of one.

    Each process takes the GPU of its local rank where there are any, and its share of the CPU cores.

    Raises:
        RunError: WORLD_SIZE asks for several processes, and the launcher's other variables are missing.
        TrainingError: a process was lost.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        if note := missing_processes(1):
            print(f"peftkit: {note}", file=sys.stderr)
        yield ProcessGroup()
        return
    import torch.distributed as dist

    initialized = not dist.is_initialized()
    try:
        group = _join_group()
        # a pipe that rows are read from may be idle for any time
        with group.new_watchdog(idle_limit=math.inf, advice="Run it again") as watchdog:
            try:
                yield group
            except RuntimeError as failure:  # a collective that another process left
                if not (lost := watchdog.lost()):
                    raise
                error = TrainingError(f"{lost}; run it again")
                reporting_rank = 1 if lost.startswith("rank 0") and "failed" not in lost else 0
                error.shared = group.rank != reporting_rank
                raise error from failure
    finally:
        if initialized and dist.is_initialized():
            dist.destroy_process_group()


def _join_group() -> ProcessGroup:
    """Joins the launched processes and sets this one's device and threads."""
    import torch
    import torch.distributed as dist

    missing = [name for name in LAUNCHER_VARIABLES if not os.environ.get(name)]
    if missing:
        raise RunError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start the processes with "
            "torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    device = "cpu"
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # objects are sent over the CPU, whatever device the models are on
        dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    torch.set_num_threads(share_of_cores(None))
    return ProcessGroup(dist.get_rank(), dist.get_world_size(), device)
