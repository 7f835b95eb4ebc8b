"""Whether a process is doing anything: its CPU time, its I/O, the state of its threads and children, and its location.

A process that waits in a collective, for a lock or for a lost connection sleeps. One that gets no CPU time on a busy
machine does not: it is runnable, and counts as active.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from traceback import walk_stack

import psutil

BUSY = 0.2
"""CPU seconds per second from which a process counts as active; a progress bar takes 0.05."""
BYTES = 1 << 12
"""Bytes read or written since the last call from which it counts as active."""
COLLECTIVES = ("torch/distributed/", "torch/autograd/graph.py", "torch/nn/parallel/", "accelerate/utils/operations.py")
"""Files that the main thread is in while it waits for other processes; a backward pass waits in its hooks."""
DEPTH = 6
"""Innermost stack frames that are compared with these."""


class Activity:
    """Measures how long this process has been idle; ``idle_seconds`` is called at regular intervals.

    Only Linux reports the state of threads; elsewhere CPU time alone decides.
    """

    def __init__(self) -> None:
        self._last_call = self._last_active = time.monotonic()
        self._cpu, self._io = time.process_time(), _io_bytes()

    def idle_seconds(self) -> float:
        """Seconds since this process or one of its children was last active."""
        now, cpu = time.monotonic(), time.process_time()
        busy = cpu - self._cpu > BUSY * (now - self._last_call) or _io_bytes() - self._io > BYTES
        if busy or _threads_active() or _children_active():
            self._last_active = now
        self._last_call, self._cpu, self._io = now, time.process_time(), _io_bytes()  # without the cost of this call
        return now - self._last_active

    def discount(self, seconds: float) -> None:
        """Takes off a time during which the whole process was suspended."""
        self._last_active += seconds


def main_thread_location() -> tuple[str, bool]:
    """The main thread's location, such as ``loop.py:120 in _step``, and whether it waits for other processes."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "?", False
    files = [caller.f_code.co_filename for caller, _ in islice(walk_stack(frame), DEPTH)]
    waiting = any(part in file for file in files for part in COLLECTIVES)
    return f"{Path(files[0]).name}:{frame.f_lineno} in {frame.f_code.co_name}", waiting


def _io_bytes() -> int:
    """Bytes that this process has read and written so far; 0 where the system does not report them."""
    with contextlib.suppress(OSError, ValueError):
        return sum(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines()[:2])
    return 0


def _threads_active() -> bool:
    """Whether a thread is running, runnable or waiting for a disk.

    Python's threads other than the main one are left out: they run progress bars, trackers and the watchdog.
    """
    helpers = {thread.native_id for thread in threading.enumerate() if thread is not threading.main_thread()}
    with contextlib.suppress(OSError):
        return any(_state(task) in "RD" for task in os.listdir("/proc/self/task") if int(task) not in helpers)
    return False


def _state(task: str) -> str:
    """A thread's state, a letter of proc(5); X for one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


def _children_active() -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP):
                    return True
    return False
