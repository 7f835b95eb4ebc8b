"""A run's checkpoints: what is in them, and writing them, failed ones again if the run still needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import CheckpointError
from peftkit.runs import checkpoints

if TYPE_CHECKING:
    import torch


@dataclass
class TrainingState:
    """Progress that is restored on resume: everything in a checkpoint that is not a tensor."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epoch of the next step."""
    batch: int = 0
    """Index of the next step's batch in its epoch."""
    evaluated: int = -1
    """Last step that was validated; a run stopped before or during a validation repeats it on resume."""
    best_value: float | None = None
    best_step: int | None = None
    stale: int = 0
    """Validations since the last improvement, for early stopping."""
    stopped_early: bool = False
    skipped: int = 0
    """Steps without an update because the loss or the gradients were not finite."""
    seconds: float = 0.0
    """Time spent training, without validations and checkpoints."""
    rows: int = 0
    tokens: int = 0
    log_offset: int = 0
    """Bytes of metrics.jsonl."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last line of the log."""


@dataclass(frozen=True)
class CheckpointContent:
    """What is written to a checkpoint."""

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]

    def copy(self) -> CheckpointContent:
        """A copy in CPU memory, which further training does not change."""
        model, optimizer = (
            {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (self.model, self.optimizer)
        )
        return replace(self, model=model, optimizer=optimizer)

    def save(self, root: Path) -> None:
        """Write the checkpoint under ``root``; raises CheckpointError."""
        checkpoints.save(root, self.step, model=self.model, optimizer=self.optimizer, state=self.state)


class CheckpointWriter:
    """Writes and prunes the checkpoints under ``root``, on the main process.

    A run ends with the weights of its best step. If the checkpoint of that step cannot be written (a disk that was full
    for a while), it is kept in memory and written before any later one, which would refer to it.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self._root, self._keep = root, keep
        self._pending: CheckpointContent | None = None

    def write(self, content: CheckpointContent, best: int | None, flush: Callable[[], Any]) -> str | None:
        """Write the pending checkpoint, if any, and then this one; returns the error if that failed.

        That of the best step is never pruned. ``flush`` writes what the checkpoint relies on, or raises OSError.
        """
        try:
            flush()
            if self._pending and self._pending.step == best != content.step:
                self._pending.save(self._root)
            content.save(self._root)
        except (CheckpointError, OSError) as error:
            if content.step == best:
                self._pending = content.copy()
            if isinstance(error, CheckpointError):
                return str(error)
            return f"checkpoint of step {content.step} could not be written: the log cannot be flushed: {error}"
        self._pending = None
        checkpoints.prune(self._root, keep=self._keep, protect={best})
        return None
