"""The log of a run in training: metrics.jsonl, trackers, and a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console

from peftkit.distributed.session import Session

console = Console(stderr=True, highlight=False)


def _new_bar() -> bars.Progress:
    """A progress bar with steps, metrics, elapsed and remaining time."""
    return bars.Progress(
        bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[metrics]}"), bars.TimeElapsedColumn(), bars.TextColumn("eta"),
        bars.TimeRemainingColumn(), console=console,
    )  # fmt: skip


@contextlib.contextmanager
def progress_bar(name: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, else a line at every quarter; yields a function to call with each count done."""
    if shown and console.is_terminal:
        with _new_bar() as progress:
            task = progress.add_task(name, total=total, metrics="")
            yield lambda count: progress.advance(task, count)
        return
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if shown and 4 * before // total < 4 * done // total:
            print(f"{name}: {done}/{total}", file=sys.stderr, flush=True)

    yield advance


class RunLog:
    """The metrics log of a run on the main process; does nothing on the others.

    ``metrics.jsonl`` is truncated to a checkpoint's offset on resume, so that no step is logged twice. A line that
    cannot be written (disk full) is retried with the next one.
    """

    def __init__(self, path: Path, session: Session, total_steps: int, *, offset: int = 0, step: int = 0) -> None:
        self._session, self._total, self._started, self._first_step = session, total_steps, time.monotonic(), step
        self._file: int | None = None
        self._bar: bars.Progress | None = None
        self._pending, self._error, self._size = b"", "", 0
        if session.is_main:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._size = min(offset, os.fstat(self._file).st_size)
            os.ftruncate(self._file, self._size)
            if self._size < offset:
                missing = offset - self._size
                self._print(f"{path} is {missing} bytes shorter than when its checkpoint was saved: lines were lost")
            if console.is_terminal:
                self._bar = _new_bar()
                self._task = self._bar.add_task("training", total=total_steps, completed=step, metrics="")
                self._bar.start()

    @property
    def end(self) -> int:
        """Size of the log in bytes, pending lines included."""
        return self._size + len(self._pending)

    def flush(self) -> None:
        """Write all lines to disk; raises OSError."""
        if self._file is not None:
            self._flush()
            os.fsync(self._file)

    def advance(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def train(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Log metrics of the steps since the last call."""
        self._log("train", {"step": step, "epoch": round(epoch, 4)}, metrics)
        shown = f"loss {metrics['loss']:.4f}  {metrics['rows_per_second']:.1f} rows/s"
        if self._bar:
            self._bar.update(self._task, completed=step, metrics=shown)
        else:
            self._print(f"step {step}/{self._total}  epoch {epoch:.2f}  {shown}  {self._eta(step)}")

    def evaluation(self, step: int, epoch: float, split: str, metrics: Mapping[str, float]) -> None:
        """Log metrics of a validation."""
        self._log(split, {"step": step, "epoch": round(epoch, 4), "split": split}, metrics)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "/" not in name)
        self._print(f"step {step}/{self._total}  epoch {epoch:.2f}  {split}: {shown}")

    def event(self, step: int, name: str, message: str, **details: Any) -> None:
        """Log an event with its details, and print its message."""
        self._write({"step": step, "event": name, "message": message, **details})
        self._print(message)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        if self._file is not None:
            os.close(self._file)

    def _log(self, prefix: str, place: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self._write({**place, **metrics})
        tracked = {f"{prefix}/{name}": value for name, value in metrics.items()}
        self._session.accelerator.log(tracked, step=place["step"])

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        self._pending += (json.dumps(line) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            if self._error != str(error):
                self._error = str(error)
                self._print(f"the log cannot be written ({error.strerror}); its lines will be retried")

    def _flush(self) -> None:
        """Write pending lines; the rest of a partly written one follows at the next call."""
        assert self._file is not None
        while self._pending:
            written = os.pwrite(self._file, self._pending, self._size)
            self._pending, self._size = self._pending[written:], self._size + written

    def _print(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text)
        elif self._session.is_main:
            print(text, file=sys.stderr, flush=True)

    def _eta(self, step: int) -> str:
        done = step - self._first_step
        seconds = (time.monotonic() - self._started) / max(done, 1) * (self._total - step)
        return f"eta {int(seconds // 60)}:{int(seconds % 60):02d}" if done else ""
