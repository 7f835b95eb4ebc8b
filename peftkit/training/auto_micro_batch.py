"""``training.micro_batch=auto``: as many rows per micro-batch as memory holds.

Before the first step the largest micro-batch of the first epoch is tried, with half the rows each time that memory runs
out; a later step is repeated likewise. The global batch does not change, so neither does the gradient. A CPU does not
refuse memory until it is too late: there the micro-batch is planned first (``peftkit.planning``). Of several processes
all take the fewest rows: with unequal numbers of micro-batches they would wait for each other forever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from peftkit.data.batching import MicroBatch, epoch_batches
from peftkit.training.step import Stepper

Result = TypeVar("Result")
AUTO = "auto"


class AutoStepper(Stepper):
    """A Stepper that halves its rows per micro-batch when memory runs out."""

    report: Callable[[str], None] = staticmethod(lambda message: None)
    """Called with a message at every change."""

    def find_micro_batch(self) -> None:
        """Try the largest micro-batch of the first epoch; leaves no gradients, and the random state unchanged."""
        batch, device = self.largest_batch(), self.session.device
        if device.type == "cpu":
            self._plan_for_cpu(batch)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._retry_on_oom(batch, partial(self._probe, batch))
        rows = self.micro_batch or 2**31 - 1
        fewest = -self.session.all_reduce_max(-rows)
        if fewest != rows:
            self._set_rows(fewest, "another process has less memory: continuing")

    def accumulate(self, batch: np.ndarray, weight: float, step: int) -> torch.Tensor:
        """Accumulate gradients, and retry in a single process; of several, the others are already waiting."""
        accumulate = partial(super().accumulate, batch, weight, step)
        return accumulate() if self.session.world_size > 1 else self._retry_on_oom(batch, accumulate)

    def largest_batch(self) -> np.ndarray:
        """The global batch of the first epoch whose largest micro-batch has the most padded tokens."""
        batches = epoch_batches(self.split.lengths, self.recipe.training, 0)
        return max(batches, key=lambda batch: self._size(self._largest(batch)))

    def _largest(self, batch: np.ndarray) -> MicroBatch:
        return max(self.micro_batches(batch), key=self._size)

    def _size(self, micro_batch: MicroBatch) -> tuple[int, int]:
        """Its padded tokens, and the tokens of its longest row."""
        longest = int(self.split.lengths[micro_batch.rows].max())
        return longest * len(micro_batch.rows), longest

    def _retry_on_oom(self, batch: np.ndarray, run: Callable[[], Result]) -> Result:
        """Run on a global batch, with half the rows per micro-batch each time that memory runs out."""
        from accelerate.utils.memory import should_reduce_batch_size

        while True:
            try:
                return run()
            except (RuntimeError, MemoryError) as error:
                rows = max(len(micro_batch.rows) for micro_batch in self.micro_batches(batch))
                if rows == 1 or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                    raise
            # only here is the exception gone, whose frames hold the micro-batch's tensors
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()  # does nothing where CUDA is not in use
            self._set_rows(rows // 2, f"out of memory with {rows} rows: retrying")

    def _set_rows(self, rows: int, reason: str) -> None:
        self.micro_batch = rows
        self.report(f"{reason} with {rows} rows per micro-batch; global batch unchanged")

    def _probe(self, batch: np.ndarray) -> None:
        """Run the largest micro-batch forward and backward, discard its gradients, and wait for no other process."""
        session, module = self.session, self.module
        module.train()
        with session.accelerator.no_sync(module):
            # DDP's forward waits for the buffers of the others; a process that retries would wait alone
            local = module if session.sharded else session.accelerator.unwrap_model(module)
            with session.accelerator.autocast():
                loss = local(self.collate(self._largest(batch).rows))
            session.accelerator.backward(loss)
        self.optimizer.zero_grad(set_to_none=True)

    def _plan_for_cpu(self, batch: np.ndarray) -> None:
        import psutil

        from peftkit.planning.plan import micro_batch_bytes
        from peftkit.planning.traced_model import Shape

        module = self.session.accelerator.unwrap_model(self.module)
        micro_batch = self._largest(batch)
        _, tokens = self._size(micro_batch)
        rows = wanted = len(micro_batch.rows)
        free = int(psutil.virtual_memory().available)
        tokens_scored = self.split.scored
        scored = 0.0 if tokens_scored is None else float(tokens_scored[micro_batch.rows].mean())
        while rows > 1:
            shape = Shape(rows, tokens, min(int(scored * rows), rows * (tokens - 1)))
            if micro_batch_bytes(self.recipe, module.head.info, self.tokenizer, self.session.dtype, shape) <= free:
                break
            rows //= 2
        if rows < wanted:
            self._set_rows(rows, f"{wanted} rows need more memory than is free: starting")
