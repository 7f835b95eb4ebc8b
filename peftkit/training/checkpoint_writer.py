"""Writes a run's checkpoints and retries failed ones that the run still needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import CheckpointError
from peftkit.runs import checkpoints

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CheckpointContent:
    """What is written to a checkpoint."""

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]

    def copy(self) -> CheckpointContent:
        """A copy in CPU memory, which further training does not change."""
        return CheckpointContent(self.step, _copy(self.model), _copy(self.optimizer), self.state)

    def save(self, root: Path) -> None:
        """Write the checkpoint under ``root``; raises CheckpointError."""
        checkpoints.save(root, self.step, model=self.model, optimizer=self.optimizer, state=self.state)


def _copy(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


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

        Args:
            best: the best step so far; its checkpoint is never pruned.
            flush: writes to disk what the checkpoint relies on; may raise OSError.
        """
        error = self._try_to_write(content, best, flush)
        if error and content.step == best:
            self._pending = content.copy()
        if not error:
            self._pending = None
            checkpoints.prune(self._root, keep=self._keep, protect={best} if best is not None else set())
        return error

    def _try_to_write(self, content: CheckpointContent, best: int | None, flush: Callable[[], Any]) -> str | None:
        try:
            flush()
            if self._pending and self._pending.step == best != content.step:
                self._pending.save(self._root)
            content.save(self._root)
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"checkpoint of step {content.step} could not be written: the log cannot be flushed: {error}"
        return None
