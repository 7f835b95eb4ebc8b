"""Host memory that steps of ragged shapes pile up: kernels kept for every shape, and holes in the heap.

On a CPU every new (rows, tokens) has oneDNN make kernels of its own, of which it and torch's layer above it (ideep)
keep a thousand each by default, and glibc keeps freed blocks between those in use. Over a few hundred steps both double
a run's resident memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

from peftkit.data.tables import release

KERNELS = 64
"""Kernels kept: more than a pass has; those of one shape are used again in every layer."""
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
STEPS = 8
"""Optimizer steps between two returns of free memory: often enough to keep the peak, too rarely to cost time."""


def bound_kernel_cache() -> None:
    """Bounds the caches of oneDNN and of torch's layer above it (ideep), which read their settings when they make their
    first kernel; a user's own settings stay.
    """
    for setting in CACHES:
        os.environ.setdefault(setting, str(KERNELS))


def trim_heap_after(step: int) -> None:
    """``trim_heap`` after every ``STEPS`` steps, and after the 1st, 2nd and 4th, whose new shapes leave the most holes.

    Not after each: what is given back has to be taken again, which costs the next step a twentieth of its time.
    """
    if step in (1, 2, 4) or step % STEPS == 0:
        trim_heap()


def trim_heap() -> None:
    """Returns free pages of the heap (with glibc) and those of mapped tables to the system."""
    release()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
