"""Stopping on request, by a signal or a time limit: between steps, or immediately outside of the training loop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from peftkit.errors import Interrupted

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
TIME_IS_UP = 1 << 10
"""Stands for the time limit among the numbers of signals."""


class StopRequest:
    """Records SIGINT, SIGTERM or SIGUSR1, or that the time is up; a second SIGINT interrupts immediately.

    Use it as a context manager, which restores the old handlers. Outside of the main thread, where Python allows no
    handlers, only the time limit works.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.signal_number: int | None = None
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        self._handlers.enter_context(_handling(self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

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
