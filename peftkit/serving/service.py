"""What the routes share: the loaded run under its names, the threads that compute, limits and metrics."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peftkit.errors import RunError, did_you_mean
from peftkit.inference.trained_model import LoadedRun
from peftkit.models import packing
from peftkit.serving.batcher import Batcher
from peftkit.serving.decoder import Decoder, Piece, joins
from peftkit.serving.decoder import Sequence as Text
from peftkit.serving.errors import RequestError
from peftkit.serving.metrics import Metrics
from peftkit.serving.observers import RequestObserver, RequestRecord

log = logging.getLogger(__name__)
BASE = "base"
"""The name under which the base model answers, where it is served."""


@dataclass(frozen=True)
class Limits:
    """What a request, and all of them together, may ask for."""

    queue: int = 64
    """Requests that wait or are answered at the same time."""
    batch: int = 16
    """Texts that are written at the same time."""
    body: int = 1 << 20
    """Bytes of a request."""
    texts: int = 2048
    """Texts of a request for classes or vectors."""
    tokens: int = 2048
    """New tokens of a text."""
    seconds: float = 300.0
    """Until a request is given up."""


@dataclass
class Service:
    """A run that is served."""

    run: LoadedRun
    name: str
    """Of the run's own adapter, for requests."""
    limits: Limits = field(default_factory=Limits)
    with_base: bool = False
    """Whether the base model answers, too, which keeps the adapter unmerged."""
    observers: list[RequestObserver] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.lock = threading.Lock()
        self.metrics = Metrics()
        self.in_flight = 0
        self._check_names()
        if self.with_base and not self.run.adapters:
            method = self.run.manifest.method
            raise RunError(f"{self.run.path}: method '{method}' trained the base itself; leave --base out")
        if len(self.names) == 1:
            self.run.merge()
        self.decoder: Decoder | None = None
        self.batcher = Batcher(self.lock)
        if self.run.head.writes_text:
            if self.run.head.encodes_source:
                raise RunError(
                    f"{self.run.path}: an encoder–decoder cannot be served, since the server continues texts; use "
                    "`peftkit generate`"
                )
            if packing.learned_tokens(self.run.model):
                raise RunError(
                    f"{self.run.path}: method '{self.run.manifest.method}' puts a learned prompt before each text, "
                    "which the server cannot; serve a run of method lora, or use `peftkit generate`"
                )
            most = self.limits.batch if joins(self.run.model) else 1
            self.decoder = Decoder(self.activate, self.run.tokenizer, self.lock, most)

    def _check_names(self) -> None:
        given = [self.name, *self.run.others, *([BASE] if self.with_base else [])]
        if twice := next((name for name in given if given.count(name) > 1), None):
            raise RunError(
                f"two models would be called '{twice}'; give the run another name with --name, or the adapter with "
                "--adapter NAME=RUN"
            )

    @property
    def names(self) -> dict[str, str | None]:
        """Names of requests → adapters; None for the base."""
        own = {self.name: "default"} | {name: name for name in self.run.others}
        return own | ({BASE: None} if self.with_base else {})

    def adapter(self, model: str | None) -> str:
        """The name that a request means.

        Raises:
            RequestError: there is none of that name.
        """
        if model is None:
            return self.name
        if model not in self.names:
            message = f"no model is called '{model[:100]}': {did_you_mean(model[:100], self.names)}"
            raise RequestError(message, status=404, param="model", code="model_not_found")
        return model

    @contextmanager
    def activate(self, name: str) -> Iterator[Any]:
        """The model under an adapter, or as the base."""
        adapter = self.names[name]
        if adapter is None:
            with self.run.base():
                yield self.run.model
            return
        if len(self.names) > 1 and self.run.adapters:
            self.run.use_adapter(adapter)
        yield self.run.model

    async def batched(self, name: str, kind: str, compute: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """``compute`` of the items under an adapter, together with those of other requests of the kind."""

        def under_adapter(every: Sequence[Any]) -> Sequence[Any]:
            with self.activate(name):
                return list(compute(every))

        try:
            async with asyncio.timeout(self.limits.seconds):
                return list(await self.batcher.submit((name, kind), under_adapter, items))
        except TimeoutError:
            raise RequestError(f"gave up after {self.limits.seconds:g} seconds", status=408, code="timeout") from None

    async def write(self, text: Text) -> AsyncGenerator[Piece, None]:
        """The pieces of a text as they are written; stops writing when the iterator is closed."""
        assert self.decoder is not None
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        text.send = lambda piece: _send(loop, pieces, piece)
        self.decoder.submit(text)
        until = loop.time() + self.limits.seconds
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(pieces.get(), until - loop.time())
                except TimeoutError:
                    message = f"gave up after {self.limits.seconds:g} seconds"
                    raise RequestError(message, status=408, code="timeout") from None
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            text.cancelled.set()

    def enter(self) -> None:
        """Counts a request in; raises RequestError where the server is full."""
        if self.in_flight >= self.limits.queue:
            message = f"{self.in_flight} requests are waiting; try again later"
            raise RequestError(message, status=429, code="queue_full", headers={"Retry-After": "1"})
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)

    def leave(self, record: RequestRecord) -> None:
        """Counts a request out, and reports it."""
        self.in_flight -= 1
        self.metrics.in_flight.set(self.in_flight)
        self.report(record)

    def report(self, record: RequestRecord) -> None:
        self.metrics.count(record)
        for observer in self.observers:
            try:
                observer(record)
            except Exception:
                log.exception("a request observer failed")

    def close(self) -> None:
        """Ends the threads when what they have begun is done."""
        if self.decoder is not None:
            self.decoder.close()
        self.batcher.close()


def _send(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Any], piece: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(pieces.put_nowait, piece)
