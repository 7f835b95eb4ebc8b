"""Dynamic batching: requests that arrive while the model is busy are answered together.

One thread owns the model. It takes everything that waits, up to a number of texts, computes it in one call, and gives
each request its part.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

Compute = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass
class Work:
    """Part of a batch: the items of one request."""

    key: Hashable
    """Work with the same key is computed by the same call."""
    compute: Compute
    items: list[Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Sequence[Any]]


class Batcher:
    """Runs the work of all requests in one thread, which holds ``lock`` meanwhile."""

    def __init__(self, lock: threading.Lock, most: int = 64) -> None:
        self.most, self.lock = most, lock
        self._waiting: queue.Queue[Work | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="peftkit-batches", daemon=True)
        self._thread.start()

    async def submit(self, key: Hashable, compute: Compute, items: Sequence[Any]) -> Sequence[Any]:
        """``compute(items)``, perhaps together with the items of other requests; raises what it raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[Any]] = loop.create_future()
        self._waiting.put(Work(key, compute, list(items), loop, future))
        return await future

    def close(self) -> None:
        """Ends the thread after the work that waits."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        left: list[Work] = []
        while True:
            first = left.pop(0) if left else self._waiting.get()
            if first is None:
                return
            batch, count, closing = [first], len(first.items), False
            others, left = left, []
            while not self._waiting.empty():
                other = self._waiting.get()
                closing = closing or other is None
                others += [other] if other is not None else []
            for other in others:
                if other.key == first.key and count + len(other.items) <= self.most:
                    batch.append(other)
                    count += len(other.items)
                else:
                    left.append(other)
            self._compute(batch)
            if closing:
                self._waiting.put(None)

    def _compute(self, batch: list[Work]) -> None:
        alive = [work for work in batch if not work.future.cancelled()]
        if not alive:
            return
        items = [item for work in alive for item in work.items]
        try:
            with self.lock:
                answers = alive[0].compute(items)
        except BaseException as error:
            if len(alive) > 1:  # one request's text must not fail the others
                for work in alive:
                    self._compute([work])
                return
            _settle(alive[0], error=error)
            return
        start = 0
        for work in alive:
            _settle(work, answers[start : start + len(work.items)])
            start += len(work.items)


def _settle(work: Work, answer: Sequence[Any] = (), error: BaseException | None = None) -> None:
    def settle() -> None:
        if not work.future.done():
            if error is None:
                work.future.set_result(answer)
            else:
                work.future.set_exception(error)

    work.loop.call_soon_threadsafe(settle)
