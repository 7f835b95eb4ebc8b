"""What ends a run from outside: a signal, the time limit, a full disk, too little memory, a lost process."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from peftkit.distributed.session import Session
from peftkit.errors import Interrupted, PeftkitError, TrainingError
from peftkit.system import files

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
TIME_IS_UP = 1 << 10
"""Stands for the time limit among the numbers of signals."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


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
    return (session.watchdog.lost() or None) if isinstance(error, RuntimeError) else None


def _advice(session: Session) -> str:
    folder = session.folder
    if folder is None or not any((folder / "checkpoints").glob("step-*")):
        return "there is no checkpoint yet: start the run again"
    return f"its checkpoints are saved. Resume with:\n  peftkit train --resume {folder}"


class StopRequest(contextlib.ExitStack):
    """Records SIGINT, SIGTERM or SIGUSR1, or that the time is up; a second SIGINT interrupts immediately.

    Use it as a context manager, which restores the old handlers. Outside of the main thread, where Python allows no
    handlers, only the time limit works.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        super().__init__()
        self.signal_number: int | None = None
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else None

    def __enter__(self) -> StopRequest:
        self.enter_context(_handling(self._handle))
        return self

    @property
    def code(self) -> int:
        """0 to continue, a signal's number, or TIME_IS_UP."""
        if self.signal_number is not None:
            return self.signal_number
        return TIME_IS_UP if self._deadline and time.monotonic() >= self._deadline else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.signal_number = number


@contextlib.contextmanager
def stop_immediately(message: Callable[[], str]) -> Iterator[None]:
    """Within the context, where no step is under way, a signal raises Interrupted with that message."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}; {message()}", number)

    with _handling(interrupt):
        yield


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the context, a handler for SIGNALS; does nothing outside of the main thread."""
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
