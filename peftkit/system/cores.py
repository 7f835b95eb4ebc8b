"""CPU cores: how many this process may use, and its share where a run has several processes on this machine."""

from __future__ import annotations

import os


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def local_processes() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def share_of_cores(threads: int | None) -> int:
    """Threads of one process of a run: ``training.threads``, or cores ÷ processes."""
    return threads or max(1, cores() // local_processes())
