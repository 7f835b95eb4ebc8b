"""Outputs of a model for every example of a split, in order, for any batch size and number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from peftkit.data.batching import IGNORE, by_length
from peftkit.data.pipeline import EncodedSplit


class Stopped(Exception):
    """A stop was requested in the middle of an evaluation."""


@torch.no_grad()
def predict(
    forward: Callable[..., dict[str, torch.Tensor]],
    split: EncodedSplit,
    tokenizer: Any,
    *,
    device: torch.device,
    batch_size: int | None = None,
    tokens: int | None = None,
    unpadded: bool = False,
    autocast: Callable[[], Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    fill: float = IGNORE,
) -> dict[str, np.ndarray]:
    """Runs a module's ``forward(batch, outputs=True)`` over a split.

    Args:
        forward: a TaskModule in eval mode.
        batch_size, tokens: most rows and padded tokens per batch; batches are cut by length, longest first.
        unpadded: whether a batch has rows of one length.
        autocast: returns a context for each forward pass.
        rank, world_size: this process's share; the results of all are gathered on every process.
        progress: called with the number of rows done.
        should_stop: called before every forward pass, equally often on every process, on which it must return the
            same; Stopped is raised when it returns True.
        fill: what pads rows whose outputs are as long as their batch.

    Returns:
        Arrays whose first dimension is the examples, in the split's order.
    """
    batches = by_length(split.lengths, batch_size, tokens, unpadded=unpadded)
    parts: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    for number in range(0, len(batches), world_size):
        if should_stop and should_stop():
            raise Stopped
        # a process without a batch of its own runs one all the same: processes of a sharded model run together, or hang
        spare = number + rank >= len(batches)
        rows = batches[0 if spare else number + rank]
        batch = {name: tensor.to(device) for name, tensor in split.batch(rows, tokenizer).items()}
        if autocast is None:
            outputs = forward(batch, outputs=True)
        else:
            with autocast():
                outputs = forward(batch, outputs=True)
        if not spare:
            parts.append((rows, {name: tensor.float().cpu().numpy() for name, tensor in outputs.items()}))
        if progress:
            progress(len(rows) * world_size)
    if world_size > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
    return in_order(parts, len(split.lengths), fill)


def in_order(
    parts: list[tuple[np.ndarray, dict[str, np.ndarray]]], rows: int, fill: float = IGNORE
) -> dict[str, np.ndarray]:
    """Outputs of all rows from those of some, each with the rows' numbers.

    Where the second dimension follows the length of a batch, it becomes that of the longest, filled with ``fill``.
    """
    if not parts:
        return {}
    order = np.concatenate([index for index, _ in parts])
    assert len(order) == rows == len(np.unique(order)), "every row once"
    place = np.argsort(order)
    return {name: _concatenate([outputs[name] for _, outputs in parts], fill)[place] for name in parts[0][1]}


def _concatenate(arrays: list[np.ndarray], fill: float) -> np.ndarray:
    width = max(array.shape[1] for array in arrays) if arrays[0].ndim == 2 else 0
    ragged = any(array.ndim == 2 and array.shape[1] != width for array in arrays)
    if ragged:
        padding = [((0, 0), (0, width - array.shape[1])) for array in arrays]
        arrays = [np.pad(array, pad, constant_values=fill) for array, pad in zip(arrays, padding)]
    return np.concatenate(arrays)
