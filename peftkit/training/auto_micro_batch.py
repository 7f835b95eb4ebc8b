"""``training.micro_batch=auto``: as many rows a pass as memory holds, found in the first second and kept in view.

Before the first step the heaviest pass of the epoch is tried, forward and backward, and its gradients are thrown away;
where memory runs out, passes get half the rows and it is tried again. The same happens to a step later on: its
gradients are dropped and the whole step is done anew. The global batch stays, so the gradient does, too. A CPU does not
refuse memory until it is too late; there the pass is planned (``peftkit.planning``) and compared with what is free.
Of several processes each tries its own share, and all take the fewest rows that any of them found to fit: with unlike
numbers of passes they would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from peftkit.data.batching import MicroBatch, epoch_batches

if TYPE_CHECKING:
    from peftkit.training.step import Stepper

Result = TypeVar("Result")
AUTO = "auto"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer rows a pass may help."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def find_micro_batch(stepper: Stepper) -> None:
    """Tries the heaviest pass of the first epoch; leaves no gradient, and random generators as they were."""
    batch = heaviest(stepper)
    if stepper.session.device.type == "cpu":
        _plan_for_cpu(stepper, batch)
    devices = [stepper.session.device] if stepper.session.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        retry_on_oom(stepper, batch, lambda: _probe(stepper, batch))
    _agree(stepper)


def _agree(stepper: Stepper) -> None:
    """The fewest rows a pass of all processes."""
    own, unbounded = stepper.micro_batch, 2**31 - 1
    fewest = -stepper.session.all_reduce_max(-(own or unbounded))
    if fewest != (own or unbounded):
        stepper.micro_batch = fewest
        stepper.tell(f"another process has memory for {fewest} rows a pass: going on with them, the global batch stays")


def retry_on_oom(stepper: Stepper, batch: np.ndarray, work: Callable[[], Result]) -> Result:
    """Does ``work`` on a global batch; where memory runs out and the recipe leaves it to us, halves and does it anew.

    With several processes only the trial before the first step is repeated: in a step the others already wait.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            rows = max(len(piece.rows) for piece in stepper.share(batch))
            if stepper.recipe.training.micro_batch != AUTO or rows == 1 or not is_out_of_memory(error):
                raise
        # here the exception, whose frames hold the pass's tensors, is gone
        stepper.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        stepper.micro_batch = rows // 2
        stepper.tell(f"out of memory with {rows} rows a pass: going on with {rows // 2}, the global batch stays")


def heaviest(stepper: Stepper) -> np.ndarray:
    """The global batch of the first epoch that holds the pass with the most padded tokens."""
    batches = epoch_batches(stepper.split.lengths, stepper.recipe.training, 0)
    return max(batches, key=lambda batch: max(_padded(stepper, piece) for piece in stepper.share(batch)))


def _padded(stepper: Stepper, piece: MicroBatch) -> tuple[int, int]:
    longest = int(stepper.split.lengths[piece.rows].max())
    return longest * len(piece.rows), longest


def _probe(stepper: Stepper, batch: np.ndarray) -> None:
    """Forward and backward of the heaviest pass, gradients discarded, no process waiting for another."""
    piece = max(stepper.share(batch), key=lambda piece: _padded(stepper, piece))
    session, module = stepper.session, stepper.module
    module.train()
    with session.accelerator.no_sync(module):
        # DDP's forward pass waits for the others' buffers; a process that tries once more would wait alone
        own = module if session.sharded else session.accelerator.unwrap_model(module)
        with session.accelerator.autocast():
            loss = own(stepper.batch(piece.rows))
        session.accelerator.backward(loss)
    stepper.optimizer.zero_grad(set_to_none=True)


def _plan_for_cpu(stepper: Stepper, batch: np.ndarray) -> None:
    import psutil

    from peftkit.planning.plan import pass_bytes
    from peftkit.planning.traced_model import Shape

    module = stepper.session.accelerator.unwrap_model(stepper.module)
    piece = max(stepper.share(batch), key=lambda piece: _padded(stepper, piece))
    padded, tokens = _padded(stepper, piece)
    rows, free = padded // tokens, int(psutil.virtual_memory().available)
    scored = stepper.split.weights[piece.rows].mean() if module.head.scores_tokens else 0.0
    chosen = rows
    while chosen > 1:
        shape = Shape(chosen, tokens, min(int(scored * chosen), chosen * (tokens - 1)))
        planned = pass_bytes(stepper.recipe, module.head.info, stepper.tokenizer, stepper.session.dtype, shape)
        if planned <= free:
            break
        chosen //= 2
    if chosen < rows:
        stepper.micro_batch = chosen
        stepper.tell(f"a pass of {rows} rows would take more than is free: {chosen} rows, the global batch stays")
