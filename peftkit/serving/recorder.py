"""Writes what is served into a log, in a thread of its own: see ``peftkit.monitoring``."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from peftkit.inference.texts import Text
from peftkit.monitoring import features, reference
from peftkit.monitoring.log import Entry, ServingLog, spelled
from peftkit.serving.observers import RequestRecord
from peftkit.serving.service import Service

log = logging.getLogger(__name__)
WAITING = 10_000
"""Requests that wait to be written; further ones are left out, rather than that the server waits."""


class Recorder:
    """A ``RequestObserver`` that appends every answered text to a log."""

    def __init__(self, folder: ServingLog, service: Service, *, texts: bool = False, embeddings: bool = False) -> None:
        self.folder, self.service, self.texts, self.embeddings = folder, service, texts, embeddings
        self.waiting: queue.Queue[tuple[datetime, RequestRecord] | None] = queue.Queue(WAITING)
        self.left_out = 0
        self.thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self.thread.start()

    def __call__(self, record: RequestRecord) -> None:
        if record.status != 200 or not record.texts:
            return
        try:
            self.waiting.put_nowait((datetime.now(UTC) - timedelta(seconds=record.seconds), record))
        except queue.Full:
            self.left_out += 1

    def close(self) -> None:
        """Writes what waits, and ends the thread."""
        self.waiting.put(None)
        self.thread.join()
        if self.left_out:
            log.warning("%d requests came faster than they could be written to %s", self.left_out, self.folder.folder)

    def _run(self) -> None:
        while (item := self.waiting.get()) is not None:
            try:
                self.folder.append(self.entries(*item))
            except Exception:
                log.exception("a request was not written to %s", self.folder.folder)

    def entries(self, time: datetime, record: RequestRecord) -> list[Entry]:
        """One for each text of the request."""
        texts = self._grouped(record)
        run, vectors = self.service.run, None
        if self.embeddings:
            with self.service.lock, self.service.activate(record.model):
                vectors = reference.embeddings(run, texts)
        about = {"time": time, "model": record.model, "route": record.route, "seconds": record.seconds}
        entries = []
        for number, text in enumerate(texts):
            parts = features.parts(text)
            values: dict[str, Any] = {**about, **features.of_text(parts, run.tokenizer)}
            if record.labels:
                values |= {"label": record.labels[number], "probability": record.probabilities[number]}
            if "completion" in record.usage:
                values["written"] = record.usage["completion"]
            if vectors is not None:
                values["embedding"] = spelled(vectors[number])
            if self.texts:
                values["texts"] = parts
            entries.append(Entry(**values))
        return entries

    def _grouped(self, record: RequestRecord) -> list[Text]:
        """The texts as they were read: each, each pair, or all turns of a conversation together."""
        texts: Sequence[str] = record.texts
        if self.service.run.head.writes_text and not record.labels and "completion" in record.usage:
            return [tuple(texts)]
        size = len(texts) // len(record.labels) if record.labels else 1
        return [
            texts[start] if size == 1 else tuple(texts[start : start + size]) for start in range(0, len(texts), size)
        ]
