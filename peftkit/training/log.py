"""What a run says while it trains: metrics.jsonl, trackers, and a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from peftkit.distributed.session import Session

console = Console(stderr=True, highlight=False)


def columns() -> list[ProgressColumn]:
    """What a progress bar shows: steps, loss and rate, time taken, time to come."""
    said = TextColumn("{task.fields[said]}")
    steps: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    return [*steps, said, TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn()]


@contextlib.contextmanager
def bar(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and a line at every quarter elsewhere; gives what is told how many more are done."""
    if shown and console.is_terminal:
        with Progress(*columns(), console=console) as progress:
            task = progress.add_task(what, total=total, said="")
            yield lambda more: progress.advance(task, more)
        return
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        before, done = done, done + more
        if shown and 4 * before // total < 4 * done // total:
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)

    yield advance


class RunLog:
    """The metrics log of a run, on the main process; silent on the others.

    ``metrics.jsonl`` is cut back to a checkpoint's offset on resume, so that no step is logged twice. A line that
    cannot be written (disk full) is kept and tried again with the next one.
    """

    def __init__(self, path: Path, session: Session, total_steps: int, *, offset: int = 0, step: int = 0) -> None:
        self._session, self._total, self._started = session, total_steps, time.monotonic()
        self._first_step = step
        self._file: int | None = None
        self._bar: Progress | None = None
        self._pending = b""
        self._trouble = ""
        self._size = 0
        if session.is_main:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._size = min(offset, os.fstat(self._file).st_size)
            os.ftruncate(self._file, self._size)
            if self._size < offset:
                self._say(f"{path} is {offset - self._size} bytes shorter than its checkpoint knows: lines were lost")
            if console.is_terminal:
                self._bar = Progress(*columns(), console=console)
                self._task = self._bar.add_task("training", total=total_steps, completed=step, said="")
                self._bar.start()

    @property
    def end(self) -> int:
        """Bytes of the log, those included that could not be written yet."""
        return self._size + len(self._pending)

    def flush(self) -> None:
        """Brings all lines to the disk; raises OSError when they cannot be brought there."""
        if self._file is not None:
            self._flush()
            os.fsync(self._file)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def train(self, step: int, epoch: float, figures: Mapping[str, float]) -> None:
        """Logs figures of the steps since the last line."""
        self._write({"step": step, "epoch": round(epoch, 4), **figures})
        self._session.accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=step)
        said = f"loss {figures['loss']:.4f}  {figures['rows_per_second']:.1f} rows/s"
        if self._bar:
            self._bar.update(self._task, completed=step, said=said)
        else:
            self._say(f"step {step}/{self._total}  epoch {epoch:.2f}  {said}  {self._eta(step)}")

    def evaluation(self, step: int, epoch: float, split: str, figures: Mapping[str, float]) -> None:
        """Logs figures of a validation."""
        self._write({"step": step, "epoch": round(epoch, 4), "split": split, **figures})
        self._session.accelerator.log({f"{split}/{name}": value for name, value in figures.items()}, step=step)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if "/" not in name)
        self._say(f"step {step}/{self._total}  epoch {epoch:.2f}  {split}: {shown}")

    def event(self, step: int, name: str, message: str) -> None:
        """Logs something worth knowing, and says it."""
        self._write({"step": step, "event": name, "message": message})
        self._say(message)

    def close(self) -> None:
        """Stops the bar and closes the file."""
        if self._bar:
            self._bar.stop()
        if self._file is not None:
            os.close(self._file)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        self._pending += (json.dumps(line) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            if self._trouble != str(error):
                self._trouble = str(error)
                self._say(f"the log cannot be written ({error.strerror}); its lines are kept and tried again")

    def _flush(self) -> None:
        """Writes what is pending; of a line that was written in part, the rest follows at the next call."""
        assert self._file is not None
        while self._pending:
            done = os.pwrite(self._file, self._pending, self._size)
            self._pending, self._size = self._pending[done:], self._size + done

    def _say(self, text: str) -> None:
        if self._session.is_main:
            if self._bar:
                self._bar.console.print(text)
            else:
                print(text, file=sys.stderr, flush=True)

    def _eta(self, step: int) -> str:
        done = step - self._first_step
        if not done:
            return ""
        seconds = (time.monotonic() - self._started) / done * (self._total - step)
        return f"eta {int(seconds // 60)}:{int(seconds % 60):02d}"
