"""A command carried out in a process of its own: its output, its time by the clock, the memory of its whole tree."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil

INTERVAL = 0.1
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class Finished:
    """What a command left."""

    code: int
    output: str
    errors: str
    seconds: float
    """From the start of the process to its end, or to the sign that was waited for."""
    peak_rss_gb: float
    """Largest sum of the resident sets of the process and its descendants, and no less than any one's own peak."""


def run(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    until: Callable[[str], bool] | None = None,
    limit: float = 7200,
) -> Finished:
    """Carries out a command.

    Args:
        environment: variables over those of this process.
        until: told what the command has written so far (stdout and stderr), every few milliseconds; once it says yes
            the time is taken and the command is ended.
        limit: seconds after which it is ended as failed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True, start_new_session=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        memory = _Memory(process.pid)
        memory.start()
        met = False
        try:
            with _terminable():
                met = _wait(process, lambda: until(_read(out) + _read(err)) if until else False, started + limit)
        finally:  # an interrupted measurement leaves nothing running
            seconds = time.perf_counter() - started
            if process.poll() is None:
                _end(process)
            memory.stop()
        code = 0 if met else process.returncode
        return Finished(code, _read(out), _read(err), seconds, memory.peak / 2**30)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM ends this process as SIGINT does, by an exception."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(process: subprocess.Popen[str], met: Callable[[], bool], deadline: float) -> bool:
    """Whether the sign came before the process ended, or its time did."""
    while time.perf_counter() < deadline:
        if met():
            return True
        try:
            process.wait(0.02)
            return met()
        except subprocess.TimeoutExpired:
            continue
    return False


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the process and whatever it started."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _read(file: object) -> str:
    """A file's content from the start, at whatever place another process writes."""
    descriptor = file.fileno()  # type: ignore[attr-defined]
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")


class _Memory(threading.Thread):
    """Watches the resident sets of a process and its descendants."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process, self._over = process, threading.Event()
        self.peak = 0

    def run(self) -> None:
        """Looks until it is told to stop."""
        while not self._over.wait(INTERVAL):
            try:
                root = psutil.Process(self._process)
                tree = [root, *root.children(recursive=True)]
                self.peak = max(self.peak, sum(map(_resident, tree)), *map(_own_peak, tree))
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue

    def stop(self) -> None:
        """Ends the watch."""
        self._over.set()
        self.join()


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _own_peak(process: psutil.Process) -> int:
    """The high-water mark of one process, which no interval misses."""
    try:
        with open(f"/proc/{process.pid}/status", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), 0)
    except OSError:
        return 0
