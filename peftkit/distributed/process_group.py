"""Rows of one command shared between the processes that a launcher started: each does its part, the main one writes.

    with processes.joined() as group:
        model = group.main_first(lambda: load(run, device=group.device))
        for chunk in group.chunks(rows, 512):                    # read by the main process alone
            labels = group.map_sharded(chunk, model.predict)           # in the chunk's order, on every process

All processes run the same lines. Item i of a list is rank ``i % world_size``'s, so that no item is lost or done twice
however they divide, and a rank may have none. Every process holds the whole model. An error of one is raised on all,
after which the main one alone speaks of it; one that is killed or stopped is named by the watch of training.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from peftkit.distributed.launched import missing_processes
from peftkit.errors import PeftkitError, RunError, TrainingError

Item = TypeVar("Item")
Result = TypeVar("Result")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells a process beside WORLD_SIZE."""
PATIENCE = 5.0
"""Seconds to wait for the word which process was lost, after a collective failed."""


@dataclass(frozen=True)
class ProcessGroup:
    """One process's view of those that share the rows."""

    rank: int = 0
    world_size: int = 1
    device: str | None = None
    """Where this process's model goes; None leaves the choice to whoever loads it."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that reads, writes and speaks."""
        return self.rank == 0

    def run_collectively(self, work: Callable[[], Result]) -> Result:
        """What this process's work gives, once all have done theirs.

        Raises:
            PeftkitError: the first failing process's error, on every process.
        """
        if self.world_size == 1:
            return work()
        result: Any = None
        error: PeftkitError | None = None
        try:
            result = work()
        except PeftkitError as raised:
            error = raised
        except Exception as raised:  # a process that left by itself would leave the others waiting
            error = TrainingError(f"{type(raised).__name__}: {raised}")
            error.__cause__ = raised
        for rank, told in enumerate(self._gathered(error)):
            if told is not None:
                found = error if error and rank == self.rank else told
                found.shared = True
                found.args = (f"rank {rank}: {found}" if rank else str(found), *found.args[1:])
                raise found
        return result  # type: ignore[no-any-return]

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """What every process's work gives, by rank, on every process; an error of one is raised on all."""
        return self._gathered(self.run_collectively(work))

    def run_on_main(self, work: Callable[[], Result]) -> Result:
        """What the main process's work gives, on every process."""
        made = self.run_collectively(work if self.is_main else _nothing)
        if self.world_size > 1:
            import torch.distributed as dist

            held: list[Any] = [made]
            dist.broadcast_object_list(held, src=0)
            made = held[0]
        return made  # type: ignore[return-value]

    def main_first(self, work: Callable[[], Result]) -> Result:
        """What this process's own work gives; the others begin when the main one has filled the caches."""
        if self.is_main:
            made = self.run_collectively(work)
            self.run_collectively(_nothing)
        else:
            self.run_collectively(_nothing)
            made = self.run_collectively(work)
        return made

    def map_sharded(self, items: Sequence[Item], work: Callable[[list[Item]], Iterable[Result]]) -> list[Result]:
        """A result for each item, in their order, on every process; ``work`` gives those of some, in their order."""
        if self.world_size == 1:
            return list(work(list(items)))
        mine = list(items[self.rank :: self.world_size])
        parts = self.gather(lambda: list(work(mine)) if mine else [])
        whole: list[Any] = [None] * len(items)
        for rank, part in enumerate(parts):
            whole[rank :: self.world_size] = part  # raises ValueError unless there is one result an item
        return whole

    def chunks(self, rows: Iterator[Item], size: int) -> Iterator[list[Item]]:
        """Rows that the main process reads, on every process: at most ``size`` for each of them at a time."""
        while chunk := self.run_on_main(lambda: list(itertools.islice(rows, size * self.world_size))):
            yield chunk

    def _gathered(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found


@contextlib.contextmanager
def init_process_group() -> Iterator[ProcessGroup]:
    """Brings the launched processes together while a command runs; without a launcher a group of one.

    Each takes the GPU of its local rank where there are any, and its share of the CPU's cores. That more processes were
    asked for than run is told on stderr.

    Raises:
        RunError: there are to be several processes, and the launcher has not said how they find each other.
        TrainingError: a process was lost.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        note = missing_processes(1)
        if note:
            print(f"peftkit: {note}", file=sys.stderr)
        yield ProcessGroup()
        return
    import torch.distributed as dist

    from peftkit.distributed.watchdog import Watchdog, address
    from peftkit.system.parallel import local_processes

    group, ours = _meet()
    try:
        where = address(group.world_size, local_processes())
        # a pipe that is read may be silent for as long as it likes
        with Watchdog(
            group.rank, group.world_size, lambda value: group.run_on_main(lambda: value), address=where,
            outside=math.inf, then="Run it again",
        ) as watch:  # fmt: skip
            try:
                yield group
            except RuntimeError as error:  # a collective that another process left
                lost = watch.lost(wait=PATIENCE)
                if not lost:
                    raise
                told = TrainingError(f"{lost}; run it again")
                speaker = 1 if lost.startswith("rank 0") and "failed" not in lost else 0
                told.shared = group.rank != speaker
                raise told from error
    finally:
        if ours:
            dist.destroy_process_group()


def _meet() -> tuple[ProcessGroup, bool]:
    """This process's place among the launched ones, and whether it was made here; sets its device and threads."""
    import torch
    import torch.distributed as dist

    from peftkit.distributed import session
    from peftkit.system import parallel

    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise RunError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start the processes with "
            "torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    device = "cpu"
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:  # objects go over the CPU, whatever the models are on
        dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo", timeout=session.PATIENCE)
    torch.set_num_threads(parallel.share_of_cores(None))
    return ProcessGroup(dist.get_rank(), dist.get_world_size(), device), ours


def _nothing() -> Any:
    return None
