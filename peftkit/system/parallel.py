"""Chunks of rows worked on by several processes, in order: for work in Python, of which a process does one at a time.

    for made in in_order(encode_chunk, range(0, rows, 1000), workers=4): …

Workers are forked: they begin at once and have all that this process has read, tokenizer and mapped rows included; only
what they make is sent back, and few chunks are under way at a time. Where processes are not forked (all but Linux),
where there is one core, and where little is left to do or most of it cannot be shared, all of it is done here.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from peftkit.errors import TrainingError

T = TypeVar("T")
TRIED = 2
WORTH = 2.0
"""Seconds of work left from which processes are started, by the time that the last chunk tried took."""
GAIN = 2.0
"""Times that working on a chunk must take what is done with it afterwards: that part, and receiving what others made,
stays in one process. Tokenizing sentences in Rust alone does not pay (200,000 rows: 12.4 s in two processes, 9.3 in
one); chat templates do."""
DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
_held: dict[str, Any] = {}
"""In a worker: what it does, and where it keeps what it would have logged."""


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def local_processes() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def share_of_cores(threads: int | None) -> int:
    """What one process of a run may keep busy: ``training.threads``, or cores ÷ processes."""
    return threads or max(1, cores() // local_processes())


def in_order(work: Callable[[int], T], items: Sequence[int], workers: int) -> Iterator[T]:
    """``work`` of every item, in the items' order, whoever does it.

    The first two are done here: what they read for all of them the workers then have, what the first warns of is said
    once, and the second, for which all is ready, tells how long they take. An exception of ``work`` is raised where its
    item stands; what workers log is logged here.

    Args:
        work: a function of an item alone; its value is sent between processes.
        workers: processes at most; 1 does all of it here.

    Raises:
        TrainingError: a worker was killed.
    """
    left, spent, followed = items[TRIED:], 0.0, 0.0
    for item in items[:TRIED]:
        started = time.perf_counter()
        made = [work(item)]
        spent, given = time.perf_counter() - started, time.perf_counter()
        yield made.pop()
        followed = time.perf_counter() - given
    worth = spent * len(left) >= WORTH and spent >= GAIN * followed
    if workers < 2 or len(left) < 2 or not worth or not _may_fork():
        yield from map(work, left)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(left)), multiprocessing.get_context("fork"), _begin, (work, os.getpid())
    )
    try:
        yield from _results(pool, left, 2 * workers)
    except BrokenProcessPool:
        raise TrainingError(
            "a process that worked on the rows was killed, perhaps for want of memory; training.threads=1 works on "
            "them in one"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _may_fork() -> bool:
    """Not where libraries do not bear it, nor in a process that multiprocessing allows no children."""
    return sys.platform.startswith("linux") and not multiprocessing.current_process().daemon


def _results(pool: ProcessPoolExecutor, items: Sequence[int], ahead: int) -> Iterator[Any]:
    """Values in order, with as many chunks as ``ahead`` begun or waiting to be taken."""
    left = iter(items)
    begun = deque(pool.submit(_one, item) for item in islice(left, ahead))
    while begun:
        value, said = begun.popleft().result()
        begun.extend(pool.submit(_one, item) for item in islice(left, 1))
        for record in said:
            logging.getLogger(record.name).handle(record)
        yield value


def _begin(work: Callable[[int], Any], parent: int) -> None:
    """A worker's first act: it ends when its parent does, leaves Ctrl-C to it, and uses one core."""
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    records = _Records()
    logging.getLogger().handlers = [records]
    _held.update(work=work, records=records)


def _one(item: int) -> tuple[Any, list[logging.LogRecord]]:
    value = _held["work"](item)
    return value, _held["records"].taken()


class _Records(logging.Handler):
    """Keeps what is logged, as text."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None
        self._kept.append(record)

    def taken(self) -> list[logging.LogRecord]:
        """What was kept since the last call."""
        kept, self._kept = self._kept, []
        return kept
