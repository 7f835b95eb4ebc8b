"""Stopping on request: signals and time limits, noticed between steps; at once where there is nothing to finish."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from peftkit.errors import Interrupted

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopRequest:
    """Remembers that SIGINT, SIGTERM or SIGUSR1 came, or that the time is up; a second SIGINT acts at once.

    Use as a context manager, which puts the old handlers back. Off the main thread, where Python allows no handlers,
    only the time limit works.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.signal_number: int | None = None
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    @property
    def code(self) -> int:
        """0 to go on, a signal's number, or -1 when the time is up."""
        if self.signal_number is not None:
            return self.signal_number
        return -1 if self._deadline and time.monotonic() >= self._deadline else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.signal_number = number


@contextlib.contextmanager
def at_once(message: Callable[[], str]) -> Iterator[None]:
    """Before and after the loop, where no step is under way, a signal raises Interrupted with that message."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}; {message()}", number)

    old: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        old = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
