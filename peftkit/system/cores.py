"""CPU cores: how many this process may use, its share of them in a run of several processes, and how threads wait."""

from __future__ import annotations

import os

SPINS = 100
"""Rounds that an idle OpenMP thread spins before it sleeps: a few microseconds."""


def cores() -> int:
    """CPU cores that this process may use, by its affinity and its container's quota (a part of a core counts)."""
    from joblib import cpu_count  # takes a fifth of a second to import

    return int(cpu_count())


def limit_spinning() -> None:
    """Lets OpenMP threads sleep soon while they wait for each other, unless the user has chosen how they wait.

    GNU OpenMP's default is to spin for milliseconds, which takes a core from the very thread that is waited for as soon
    as another program is busy. It reads the setting when torch is loaded: afterwards this has no effect.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def local_processes() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def share_of_cores(threads: int | None) -> int:
    """Threads of one process of a run: ``training.threads``, or cores ÷ processes."""
    return threads or max(1, cores() // local_processes())
