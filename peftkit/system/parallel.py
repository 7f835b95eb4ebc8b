"""Chunks of rows processed by several processes, with results in order: for Python code, which the GIL serializes.

Workers are forked, so that they start at once with everything that this process has read, tokenizer and mapped rows
included; only results are sent back, and few chunks are in flight.
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
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any, TypeVar

from peftkit.errors import TrainingError

T = TypeVar("T")
TRIED = 2
"""Chunks processed here first, to measure them."""
WORTH = 2.0
"""Estimated seconds of remaining work from which processes are started."""
GAIN = 2.0
"""How many times longer a chunk's work must take than what the caller does with its result, which stays in one process.
Chat templates qualify; tokenizing sentences in Rust does not (200,000 rows: 12.4 s in two processes, 9.3 s in one)."""
DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
_work: list[Callable[[int], Any]] = []
"""In a worker process: its work function."""
_records: SimpleQueue[logging.LogRecord] = SimpleQueue()
"""In a worker process: the log records that it has not sent yet."""


def in_order(work: Callable[[int], T], items: Sequence[int], workers: int) -> Iterator[T]:
    """``work`` of every item, in the items' order.

    The first two items run in this process: workers then inherit what the first one loads, warnings that are given once
    are given once, and the second one shows how long an item takes. The others do, too, where processes cannot be
    forked, or too little work is left. What workers log is logged here.

    Raises:
        TrainingError: a worker was killed. An exception of ``work`` is raised at its item's place in the order.
    """
    left, spent, followed = items[TRIED:], 0.0, 0.0
    for item in items[:TRIED]:
        started = time.perf_counter()
        results = [work(item)]
        spent, given = time.perf_counter() - started, time.perf_counter()
        yield results.pop()  # so that no reference to it stays here
        followed = time.perf_counter() - given
    worth = spent * len(left) >= WORTH and spent >= GAIN * followed
    # elsewhere libraries do not survive a fork, and multiprocessing allows a daemon no children
    may_fork = sys.platform.startswith("linux") and not multiprocessing.current_process().daemon
    if workers < 2 or len(left) < 2 or not worth or not may_fork:
        yield from map(work, left)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(min(workers, len(left)), context, _start_worker, (work, os.getpid()))
    try:
        yield from _results(pool, left, 2 * workers)
    except BrokenProcessPool:
        raise TrainingError(
            "a worker process that encoded rows was killed, perhaps for lack of memory; training.threads=1 encodes "
            "them in a single process"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _results(pool: ProcessPoolExecutor, items: Sequence[int], ahead: int) -> Iterator[Any]:
    """Results in order, with up to ``ahead`` items submitted or waiting to be taken."""
    left = iter(items)
    submitted = deque(pool.submit(_run_item, item) for item in islice(left, ahead))
    while submitted:
        result, records = submitted.popleft().result()
        submitted.extend(pool.submit(_run_item, item) for item in islice(left, 1))
        for record in records:
            logging.getLogger(record.name).handle(record)
        yield result


def _start_worker(work: Callable[[int], Any], parent: int) -> None:
    """Initializes a worker, which ends when its parent does, leaves Ctrl-C to it, and uses one core."""
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work.append(work)
    logging.getLogger().handlers = [QueueHandler(_records)]


def _run_item(item: int) -> tuple[Any, list[logging.LogRecord]]:
    result = _work[0](item)
    return result, [_records.get() for _ in range(_records.qsize())]
