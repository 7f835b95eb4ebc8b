"""What a worker records of its validations: the metric over the seconds since the shell started the process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def age() -> float:
    """Seconds since this process was started, imports included (Linux)."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


class Curve:
    """Points of (step, seconds, seconds without validations, metric)."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.validating = 0.0

    def timed(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its seconds counted as validation."""

        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return evaluate(*arguments, **options)
            finally:
                self.validating += time.perf_counter() - started

        return call

    def add(self, step: int, metric: float) -> None:
        seconds = age()
        self.points.append(
            {"step": step, "seconds": seconds, "training_seconds": seconds - self.validating, "metric": metric}
        )
