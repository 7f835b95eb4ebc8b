"""The log of what was served: a folder with one file of JSON lines for each day, in UTC.

A line is one text and its answer. Lines are appended whole; what a killed process left of one is skipped on reading.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftkit.errors import DataError

PATTERN = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].jsonl"
Label = str | float


class Entry(BaseModel):
    """A text that was answered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    time: datetime
    model: str
    route: str
    seconds: Annotated[float, Field(ge=0)]
    """From the request's last byte to the answer's; texts of one request share it."""
    characters: Annotated[int, Field(ge=0)]
    tokens: Annotated[int, Field(ge=0)]
    unknown: Annotated[float, Field(ge=0, le=1)]
    """Share of tokens that the tokenizer does not know."""
    written: int | None = None
    """Tokens that were generated."""
    label: Label | tuple[Label, ...] | None = None
    probability: float | None = None
    embedding: str | None = None
    """fp16, little-endian, in base64."""
    texts: tuple[str, ...] | None = None
    """Only where it was asked for."""

    def vector(self) -> np.ndarray | None:
        """The embedding in fp32."""
        if self.embedding is None:
            return None
        return np.frombuffer(base64.b64decode(self.embedding), dtype="<f2").astype(np.float32)


def spelled(vector: np.ndarray) -> str:
    """An embedding as an entry holds it."""
    return base64.b64encode(np.asarray(vector).astype("<f2").tobytes()).decode()


class ServingLog:
    """Appends entries to a folder; several processes may share it."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError where the folder cannot be written."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror}", file=folder) from None
        if not os.access(folder, os.W_OK):
            raise DataError("cannot be written: no permission", file=folder)

    def append(self, entries: Iterable[Entry]) -> None:
        """Writes the entries to the files of their days."""
        days: dict[date, list[str]] = {}
        for entry in entries:
            line = entry.model_dump_json(exclude_none=True) + "\n"
            days.setdefault(entry.time.astimezone(UTC).date(), []).append(line)
        for day, lines in days.items():
            _append(self.folder / f"{day.isoformat()}.jsonl", "".join(lines).encode())


def _append(path: Path, data: bytes) -> None:
    # O_APPEND: what one call writes is in one piece, though other processes write to the file, too
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data  # a process was killed while it wrote the last line
        while data:
            data = data[os.write(file, data) :]
    finally:
        os.close(file)


@dataclass
class Served:
    """What a log holds."""

    entries: list[Entry] = field(default_factory=list)
    damaged: int = 0
    """Lines that are no entries."""

    def models(self) -> list[str]:
        return sorted({entry.model for entry in self.entries})


def read(folder: Path, *, since: date | None = None, until: date | None = None) -> Served:
    """The entries of a folder, by day.

    Args:
        since, until: the first and the last day; None for all.

    Raises:
        DataError: there is no such folder, or it holds no log, or no line of it is an entry.
    """
    if not folder.is_dir():
        raise DataError("no such folder; `peftkit serve RUN --monitor FOLDER` writes one", file=folder)
    files = [
        path for path in sorted(folder.glob(PATTERN))
        if (since is None or path.stem >= since.isoformat()) and (until is None or path.stem <= until.isoformat())
    ]  # fmt: skip
    if not files:
        days = "" if since is None and until is None else " of these days"
        raise DataError(f"expected files such as 2026-01-31.jsonl{days}, found none", file=folder)
    served, first = Served(), ""
    for path in files:
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                served.entries.append(Entry.model_validate_json(line))
            except ValidationError as error:
                served.damaged += 1
                what = error.errors(include_url=False, include_input=False, include_context=False)[0]
                first = first or f"{path}:{number}: {'.'.join(map(str, what['loc'][:1])) or 'line'}: {what['msg']}"
    if not served.entries:
        raise DataError(f"no line is one of a log of served texts ({first})" if first else "is empty", file=folder)
    return served
