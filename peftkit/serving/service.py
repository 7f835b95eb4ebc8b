"""What the routes share: the loaded run under its names, the threads that compute, limits and metrics."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peftkit.errors import RunError, did_you_mean
from peftkit.export import multi_adapter
from peftkit.inference.trained_model import LoadedRun
from peftkit.methods.layers.mixed_lora import RowAdapters
from peftkit.models import packing
from peftkit.models.kernels.packed_linear import pack_output_layer
from peftkit.serving.batcher import Batcher
from peftkit.serving.decoder import Decoder, Delivery, Piece
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
        self.mixed: RowAdapters | None = None
        """Chooses the adapter of each row, where rows of several have one batch; faster than peft for one, too."""
        self.notes: tuple[str, ...] = ()
        """What those who start the server should know."""
        self.decoder: Decoder | None = None
        self.batcher = Batcher(self.lock)
        if self.run.head.writes_text:
            self._check_writes()
            if self.run.adapters and not self.run.merge_state.merged:
                self.mixed, reason = multi_adapter.mix(self.run.model)
                if reason and len(self.names) > 1:
                    self.notes += (f"texts of each model are batched by themselves: {reason}",)
            pack_output_layer(self.run.model)
            self.decoder = Decoder(
                self.run.model, self.under, self.run.tokenizer, self.lock, self.limits.batch, _deliver, self._group_of
            )

    def _check_writes(self) -> None:
        """Raises RunError for a language model whose texts cannot be continued token by token."""
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
        if self.run.adapters and self.run.adapter != adapter:
            self.run.use_adapter(adapter)
        yield self.run.model

    @contextmanager
    def under(self, names: Sequence[str]) -> Iterator[Any]:
        """The model with each row of a batch under the adapter of that name; all of one where they are not mixed."""
        if self.mixed is None:
            with self.activate(names[0]) as model:
                yield model
            return
        with self.mixed.rows([self.names[name] for name in names]):
            yield self.run.model

    def _group_of(self, name: str) -> str | None:
        """What the texts have in common that can be written in one batch."""
        return name if self.mixed is None else None

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
        arrived: asyncio.Queue[list[Piece] | BaseException] = asyncio.Queue()
        text.receiver = (loop, arrived.put_nowait)
        self.decoder.submit(text)
        message = f"gave up after {self.limits.seconds:g} seconds"
        late = RequestError(message, status=408, code="timeout")
        timer = loop.call_later(self.limits.seconds, arrived.put_nowait, late)
        try:
            while True:
                pieces = await arrived.get()
                if isinstance(pieces, BaseException):
                    raise pieces
                for piece in pieces:
                    yield piece
                    if piece.finish is not None:
                        return
        finally:
            timer.cancel()
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


def _deliver(deliveries: list[Delivery]) -> None:
    """Hands pieces to the event loops that wait for them, all of a step at once: each call wakes a loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
    for text, pieces in deliveries:
        loop, receive = text.receiver
        by_loop.setdefault(loop, []).append(partial(receive, pieces))
    for loop, calls in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_call_all, calls)


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
