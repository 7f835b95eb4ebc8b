"""What watches the server: called once for every request that was answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class RequestRecord:
    """An answered request, without its texts."""

    route: str
    """Its path."""
    status: int
    """HTTP status."""
    seconds: float
    """From the request's last byte to the answer's."""
    model: str = ""
    """The model or adapter that answered; empty where none did."""
    texts: tuple[str, ...] = ()
    """What was read, for an observer that is allowed to keep it."""
    labels: tuple[Any, ...] = ()
    """What a classifier answered for each text."""
    probabilities: tuple[float | None, ...] = ()
    usage: Mapping[str, int] = field(default_factory=dict)
    """Tokens read and written."""


class RequestObserver(Protocol):
    """Called from the server's event loop; must return at once, and an exception is logged and ignored."""

    def __call__(self, record: RequestRecord) -> None: ...
