"""Whether a process gets anything done: its CPU time, what its threads and children are at, and where it stands.

A process that waits in a collective for another one sleeps, and so does one that hangs in a lock or a lost connection.
One that is starved of the processor on a busy machine does not sleep: it waits to run, and counts as active.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import psutil

BUSY = 0.2
"""CPU seconds a second from which on a process is at work; a progress bar takes a twentieth of one."""
BYTES = 1 << 12
"""Bytes read or written since the last look from which on it is at work."""
WAITING = ("torch/distributed/", "torch/autograd/graph.py", "torch/nn/parallel/", "accelerate/utils/operations.py")
"""Where the main thread stands while it waits for other processes; a backward pass waits in its hooks."""
DEPTH = 6
"""Innermost calls that are looked at for this."""


class Activity:
    """Told by ``look`` every now and then, how long this process has done nothing.

    Only Linux says what threads are at; elsewhere the CPU time alone must do.
    """

    def __init__(self) -> None:
        self._looked = self._active = time.monotonic()
        self._spent, self._moved = _spent(), _moved()

    def look(self) -> float:
        """Seconds since this process or a child of it last did something."""
        now, spent = time.monotonic(), _spent()
        busy = spent - self._spent > BUSY * (now - self._looked) or _moved() - self._moved > BYTES
        if busy or _threads_at_work() or _children_at_work():
            self._active = now
        self._looked, self._spent, self._moved = now, _spent(), _moved()  # what looking took is not counted
        return now - self._active

    def forgive(self, seconds: float) -> None:
        """Takes off a time in which the whole process stood still, as when it was stopped and went on."""
        self._active += seconds


def whereabouts() -> tuple[str, bool]:
    """Where the main thread stands, such as ``loop.py:120 in _step``, and whether it waits for other processes."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "?", False
    code, waits = frame.f_code, False
    place = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
    for _ in range(DEPTH):
        if frame is None:
            break
        waits = waits or any(part in frame.f_code.co_filename for part in WAITING)
        frame = frame.f_back
    return place, waits


def _spent() -> float:
    """CPU seconds of this process."""
    times = os.times()
    return times.user + times.system


def _moved() -> int:
    """Bytes that this process has read and written so far; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        return sum(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines()[:2])
    return 0


def _threads_at_work() -> bool:
    """Whether a thread runs, wants to run or waits for a disk.

    Python's own threads but the main one are left out: they keep bars, trackers and this watch alive.
    """
    aside = {thread.native_id for thread in threading.enumerate() if thread is not threading.main_thread()}
    with contextlib.suppress(OSError):
        return any(_state(task) in "RD" for task in os.listdir("/proc/self/task") if int(task) not in aside)
    return False


def _state(task: str) -> str:
    """A thread's state, a letter of proc(5); X for one that has gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


def _children_at_work() -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP):
                    return True
    return False
