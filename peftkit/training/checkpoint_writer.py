"""The checkpoints of a run in their turn; one that could not be written is made up for where the run still needs it."""

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
class Content:
    """What a checkpoint is to hold."""

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]

    def copied(self) -> Content:
        """The same in memory of its own, so that training does not change it."""
        return Content(self.step, _copied(self.model), _copied(self.optimizer), self.state)


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


class Saver:
    """Writes and prunes the checkpoints under ``root``; on the main process.

    The weights of the best step are put back at the end, so that a checkpoint of it that could not be written (a disk
    that was full for a while) is held in memory and written first as soon as that is possible. No later one is
    written before: it would point to a checkpoint that does not exist.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self._root, self._keep = root, keep
        self._owed: Content | None = None

    def write(self, content: Content, best: int | None, flush: Callable[[], Any]) -> str | None:
        """Writes a checkpoint, after the one that is owed; what kept it from being written, if anything did.

        Args:
            best: the best step so far; its checkpoint is never pruned.
            flush: brings to the disk what the checkpoint relies on; raises OSError where it cannot.
        """
        said = self._attempt(content, best, flush)
        if said and content.step == best:
            self._owed = content.copied()
        if not said:
            self._owed = None
            checkpoints.prune(self._root, keep=self._keep, protect={best} if best is not None else set())
        return said

    def _attempt(self, content: Content, best: int | None, flush: Callable[[], Any]) -> str | None:
        owed = self._owed if self._owed and self._owed.step == best != content.step else None
        try:
            flush()
            for held in (owed, content):
                if held:
                    checkpoints.save(
                        self._root, held.step, model=held.model, optimizer=held.optimizer, state=held.state
                    )
        except CheckpointError as failure:
            return str(failure)
        except OSError as failure:
            return f"checkpoint of step {content.step} could not be written: the log cannot be flushed: {failure}"
        return None
