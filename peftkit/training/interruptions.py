"""What ends a run from outside, as one error each: a signal, a full disk, no memory, another process's death."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from safetensors import SafetensorError

from peftkit.distributed.session import Session
from peftkit.errors import PeftkitError, TrainingError
from peftkit.system import files
from peftkit.training.stopping import at_once

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
PATIENCE = 5.0
"""Seconds to wait for the word which process was lost, after a collective failed."""


@contextlib.contextmanager
def guarded(session: Session) -> Iterator[None]:
    """Watches the other processes, and turns failures of machine and surroundings into one error each.

    Raises:
        Interrupted: SIGTERM, SIGINT or SIGUSR1 came where no step was under way.
        TrainingError: storage or memory gave out, or another process of the run was lost.
    """
    with session.watchdog, at_once(lambda: _how_to_go_on(session)):
        try:
            yield
        except PeftkitError:
            raise
        except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
            said = _said(error, session)
            if said is None:
                raise
            raise TrainingError(f"{said}; {_how_to_go_on(session)}") from error


def _said(error: BaseException, session: Session) -> str | None:
    """One line for a failure that is not the program's; None for one that may be."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in files.FULL_OR_BROKEN:
        return f"{error.filename or session.folder or 'a file'} cannot be written: {error.strerror}"
    if isinstance(error, SafetensorError) and "os error" in text:
        return f"{session.folder} cannot be written: {text}"
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in NO_MEMORY):
        first = text.splitlines()[0] if text else "no memory is left"
        return f"rank {session.rank} is out of memory ({first[:200]}): lower training.micro_batch or data.max_length"
    lost = session.watchdog.lost(wait=PATIENCE) if isinstance(error, RuntimeError) else ""
    return lost or None


def _how_to_go_on(session: Session) -> str:
    folder = session.folder
    if folder is None or not any((folder / "checkpoints").glob("step-*")):
        return "there is no checkpoint yet, so start it again"
    return f"what is done is in its checkpoints. Go on with:\n  peftkit train --resume {folder}"
