"""What ends a run from outside, as one error each: a signal, a full disk, too little memory, a lost process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from safetensors import SafetensorError

from peftkit.distributed.session import Session
from peftkit.errors import PeftkitError, TrainingError
from peftkit.system import files
from peftkit.training.stopping import stop_immediately

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
PATIENCE = 5.0
"""Seconds to wait for a report of which process was lost, after a collective failed."""


@contextlib.contextmanager
def guarded(session: Session) -> Iterator[None]:
    """Watch the other processes, and raise a failure of the machine or its surroundings as one error.

    Raises:
        Interrupted: SIGTERM, SIGINT or SIGUSR1 arrived while no step was under way.
        TrainingError: the disk or memory is full, or another process of the run was lost.
    """
    with session.watchdog, stop_immediately(lambda: _advice(session)):
        try:
            yield
        except PeftkitError:
            raise
        except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
            reason = _reason(error, session)
            if reason is None:
                raise
            raise TrainingError(f"{reason}; {_advice(session)}") from error


def _reason(error: BaseException, session: Session) -> str | None:
    """One line for a failure that is not the program's; None for one that may be."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in files.FULL_OR_BROKEN:
        return f"{error.filename or session.folder or 'a file'} cannot be written: {error.strerror}"
    if isinstance(error, SafetensorError) and "os error" in text:
        return f"{session.folder} cannot be written: {text}"
    if isinstance(error, MemoryError) or any(phrase in text.lower() for phrase in OUT_OF_MEMORY):
        first = text.splitlines()[0] if text else "no memory is left"
        return f"rank {session.rank} is out of memory ({first[:200]}): lower training.micro_batch or data.max_length"
    lost = session.watchdog.lost(wait=PATIENCE) if isinstance(error, RuntimeError) else ""
    return lost or None


def _advice(session: Session) -> str:
    folder = session.folder
    if folder is None or not any((folder / "checkpoints").glob("step-*")):
        return "there is no checkpoint yet: start the run again"
    return f"its checkpoints are saved. Resume with:\n  peftkit train --resume {folder}"
