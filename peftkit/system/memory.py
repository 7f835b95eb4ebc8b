"""Limits what variable-length batches add to a run's resident memory: without this, they double it.

On a CPU every new (rows, tokens) makes oneDNN compile kernels, of which it and torch's layer above it (ideep) cache a
thousand each by default, and glibc keeps freed blocks between those in use.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable
from weakref import WeakSet

KERNELS = 64
"""Kernels cached: more than a forward pass needs; those of one shape are reused in every layer."""
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # read when the first kernel is compiled
STEPS = 8
"""Optimizer steps between two returns of free memory: often enough to limit the peak, too rarely to cost time."""
mapped_files: WeakSet[mmap.mmap] = WeakSet()
"""Open read-only maps of files, whose pages may be released at any time without losing content."""


def bound_kernel_cache() -> None:
    """Bounds the kernel caches of oneDNN and ideep, unless the user has set them."""
    for setting in CACHES:
        os.environ.setdefault(setting, str(KERNELS))


def trim_heap_after(step: int) -> None:
    """``trim_heap`` after every ``STEPS`` steps, and after the 1st, 2nd and 4th, whose new shapes leave the most holes.

    Not after each: what is returned has to be requested again, which adds 5 % to the next step's time.
    """
    if step in (1, 2, 4) or step % STEPS == 0:
        trim_heap()


def trim_heap() -> None:
    """Returns free heap pages (with glibc) and the pages of mapped files to the system."""
    release_mapped_pages()
    if (trim := _malloc_trim()) is not None:
        trim(0)


def release_mapped_pages() -> None:
    """Returns the pages of mapped files to the system, which otherwise stay resident until it needs the memory."""
    for mapped in list(mapped_files):
        if hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_DONTNEED)


def discard_pages(address: int, size: int) -> None:
    """Returns the whole pages of a memory range to the system. Its content is lost, or read again if a file is mapped.

    For memory that will not be read any more, but whose owner keeps more than the range mapped.
    """
    start, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and start < end:
        library = ctypes.CDLL(None)
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
